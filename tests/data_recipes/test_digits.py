"""The digits world's recipe, run as a program at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.evaluation.digits import TASKS, score

ROOT = Path(__file__).parents[2]
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


def run_recipe(out, *options):
    sizes = ["--scenes", "12", "--text_share", "0.001", "--eval_scenes", "40"]
    command = [sys.executable, ROOT / "data_recipes/digits.py", "--out", out, *sizes, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "world"
    done = run_recipe(out, "--seed", "0")
    assert done.returncode == 0, done.stderr
    return out


def test_no_scan_of_evaluation_is_seen_in_training(world):
    recipe = json.loads((world / "recipe.json").read_text(encoding="utf-8"))
    assert not set(recipe["train_scans"]) & set(recipe["eval_scans"])
    assert len(recipe["train_scans"]) + len(recipe["eval_scans"]) == 1797
    seen = {scan for row in read_rows(world / "cells.jsonl") for scan in row["scans"]}
    assert seen <= set(recipe["train_scans"])
    unseen = {scan for row in read_rows(world / "eval/cells.jsonl") for scan in row["scans"]}
    assert unseen <= set(recipe["eval_scans"])


def test_rows_have_their_pictures_and_answers(world):
    for name in ("caption.jsonl", "places.jsonl", "questions.jsonl", *(f"eval/{task}.jsonl" for task in TASKS)):
        for row in read_rows(world / name):
            items = [item for message in row["messages"] for item in message["content"]]
            assert sum(item["type"] == "image" for item in items) == len(row["media"]) == 1
            media = row["media"][0]
            with Image.open((world / name).parent / media["path"]) as image:
                assert image.size == (media["width"], media["height"])
    assert all(row["media"] == [] for row in read_rows(world / "text.jsonl"))


@pytest.mark.parametrize("task", TASKS)
def test_reference_answers_score_one(world, task):
    rows = read_rows(world / "eval" / f"{task}.jsonl")
    answers = [row["messages"][-1]["content"][0]["text"] for row in rows]
    assert set(score(task, answers, rows).values()) == {1.0}


def test_answers_follow_from_the_scene(world):
    for task in ("position", "count", "color", "presence"):
        for row in read_rows(world / "eval" / f"{task}.jsonl"):
            question = row["messages"][0]["content"][1]["text"]
            assert row["meta"]["answer"] == answer_of(task, question, row["meta"]), (question, row["meta"])


def answer_of(task, question, meta):
    """Worked out from the question's words, not as the recipe does it."""
    asked = next((int(sign) for sign in question if sign.isdigit()), None)
    if task == "position":
        (place,) = (place for place in meta["places"] if place in question)
        return str(meta["digits"][meta["places"].index(place)])
    if task == "count":
        return str(len(meta["places"]))
    if task == "presence":
        return "yes" if asked in meta["digits"] else "no"
    (colour,) = (colour for digit, colour in zip(meta["digits"], meta["colours"], strict=True) if digit == asked)
    return colour


def test_same_seed_same_files(world, tmp_path):
    run_recipe(tmp_path / "again", "--seed", "0")
    run_recipe(tmp_path / "other", "--seed", "1")
    for name in ("questions.jsonl", "eval/presence.jsonl", "images/000003.png", "recipe.json"):
        assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


@pytest.fixture(scope="module")
def sparse_world(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "sparse"
    done = run_recipe(out, "--seed", "0", "--spread", "2")
    assert done.returncode == 0, done.stderr
    return out


def test_spread_out_digits_stand_in_a_cell_of_their_place(sparse_world):
    """And nothing stands in the other three: ink is nowhere but where the rows say."""
    rows, cells = read_rows(sparse_world / "eval/caption.jsonl"), read_rows(sparse_world / "eval/cells.jsonl")
    corners = set()
    for row, cell_row in zip(rows, cells, strict=True):
        filled = [number for number, digit in enumerate(cell_row["digits"]) if digit is not None]
        places = [f"{ROWS[number // 6 // 2]} {COLUMNS[number % 6 // 2]}" for number in filled]
        assert len(cell_row["digits"]) == 36 and sorted(places) == sorted(row["meta"]["places"])
        corners |= {(number // 6 % 2, number % 2) for number in filled}
        pixels = np.asarray(Image.open(sparse_world / "eval" / row["media"][0]["path"])).astype(int)
        assert pixels.shape == (96, 96, 3)
        contrast = np.ptp(pixels.reshape(6, 16, 6, 16, 3), axis=(1, 3)).max(axis=-1).flatten()
        assert set(np.flatnonzero(contrast > 60)) == set(filled)
    assert len(corners) == 4


def test_spread_out_digits_are_asked_about_as_ever(world, sparse_world):
    for name in ("questions.jsonl", "caption.jsonl", "text.jsonl", "eval/count.jsonl"):
        one, other = (read_rows(directory / name) for directory in (world, sparse_world))
        assert [row["messages"] for row in one] == [row["messages"] for row in other]


def test_refuses_a_directory_that_holds_files(world):
    before = sorted(world.parent.iterdir())
    done = run_recipe(world, "--seed", "0")
    assert done.returncode == 2
    assert "already holds files" in done.stderr
    assert sorted(world.parent.iterdir()) == before
