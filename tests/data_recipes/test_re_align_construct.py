"""Pairs of plain rows by the program: what it writes can be trained on, and killing it changes nothing."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm import load_processor
from mllm.assemble import assemble_checkpoint
from mllm.data.contrasts import RETRIEVED, Contrast
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.data.pairs import encode_pair
from mllm.testing import save_tiny_parts

PROGRAM = Path(__file__).parents[2] / "data_recipes/re_align.py"
COUNT = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that talks nonsense, and rows about random pictures."""
    folder = tmp_path_factory.mktemp("world")
    assemble_checkpoint(folder / "model", **save_tiny_parts(folder / "parts"))
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(COUNT):
            picture = rng.integers(0, 255, (24, 20 + number, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"images/{number}.png")
            question = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
            answer = f"There are {number + 2} red cups at the top left, and a blue {number} below."
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            media = [{"kind": "image", "path": f"images/{number}.png"}]
            file.write(json.dumps({"id": number, "messages": messages, "media": media}) + "\n")
    return folder


def command(world, out, *options):
    given = ["--rows", world / "rows.jsonl", "--model", world / "model", "--out", out, "--tau", "0.999"]
    return list(map(str, [*given, "--top_k", 3, "--portion", 4, *options]))


def contents(out):
    left_out = ("examples.html", "complete.json")
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in left_out}


def test_pairs_can_be_trained_on(world, tmp_path, capsys):
    runpy.run_path(str(PROGRAM))["construct"](command(world, tmp_path / "pairs"))
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "pairs/report.json").read_text())
    assert report["pairs"] > COUNT / 2 and f" {report['pairs']} " in told and "examples.html" in told
    rows = open_mixture(read_mixture({"mixture": str(tmp_path / "pairs/mixture.yaml")}))
    processor = load_processor(world / "model")
    assert len(rows) == report["pairs"]
    for position in range(len(rows)):
        pair = encode_pair(rows[position], processor, Contrast(RETRIEVED))
        assert len(pair.sides) == 3 and len(pair.shown) == 2
    facts = json.loads((tmp_path / "pairs/recipe.json").read_text())["components"]
    assert len(facts["completer"]["sha256"]) == 64 and "rules" in facts["masker"]


def test_an_unknown_component_is_refused(world, tmp_path, capsys, monkeypatch):
    program = runpy.run_path(str(PROGRAM))
    monkeypatch.setattr(
        sys, "argv", ["re_align.py", "construct", *command(world, tmp_path / "pairs", "--masker", "luck")]
    )
    with pytest.raises(SystemExit):
        program["main"]()
    assert "one of rules, endpoint" in capsys.readouterr().err and not (tmp_path / "pairs").exists()


@pytest.mark.slow
def test_killed_as_a_process_it_goes_on_to_the_same_pairs(world, tmp_path):
    process = [sys.executable, str(PROGRAM), "construct"]
    subprocess.run([*process, *command(world, tmp_path / "whole")], check=True, capture_output=True)
    for sign in ("pairs.work/masker-*", "pairs.work/completer-*/*-00.jsonl", "pairs.work/verdicts-*/*-01.jsonl"):
        running = subprocess.Popen([*process, *command(world, tmp_path / "pairs")], stderr=subprocess.DEVNULL)
        while running.poll() is None and not list(tmp_path.glob(sign)):
            time.sleep(0.0005)
        if running.poll() is None:
            os.kill(running.pid, signal.SIGKILL)
        assert running.wait() in (-signal.SIGKILL, 0)
    if not (tmp_path / "pairs").exists():
        subprocess.run([*process, *command(world, tmp_path / "pairs")], check=True, capture_output=True)
    assert contents(tmp_path / "pairs") == contents(tmp_path / "whole")
