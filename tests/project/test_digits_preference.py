"""The digits world's experiment on preferences: its steps fit the programs they call."""

import argparse
import re
import runpy
from pathlib import Path

import pytest
import yaml

from mllm.errors import CheckpointError, MllmError
from mllm.training.plan import apply_change
from mllm.training.preference_options import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program():
    return runpy.run_path(str(ROOT / "scripts" / "digits_preference.py"))


@pytest.fixture
def steps(program, tmp_path):
    args = argparse.Namespace(
        methods=list(program["METHODS"]), sft_steps=300, scenes=100, tau=0.9, tasks=["caption"], set=[]
    )
    return program["steps"](3, tmp_path / "quickstart", tmp_path / "out", args)


def test_every_step_calls_a_program_with_options_that_it_knows(steps):
    for name, (_, (_, path, *words)) in steps.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        options = [word for word in words if word.startswith("--")]
        if path.startswith("data_recipes"):
            text = (ROOT / "mllm" / "preference_data" / "arguments.py").read_text(encoding="utf-8")
        if path == "train/sft.py":
            text = "".join((ROOT / "mllm" / "training" / f"{one}.py").read_text() for one in ("options", "arguments"))
            options = [option for option in options if option not in ("--seed", "--output_dir", "--max_steps")]
        for option in options:
            # As a field of a dataclass, or as argparse is told.
            known = rf"^    {option.removeprefix('--')}:|\"{option}\""
            assert re.search(known, text, re.MULTILINE), (name, option)


def test_steps_read_what_earlier_steps_make(steps, tmp_path):
    made = {tmp_path / "quickstart"}
    for name, (product, words) in steps.items():
        paths = [Path(word.split("=")[-1].split()[-1].rstrip("}")) for word in words if str(tmp_path) in word]
        out = {Path(words[at + 1]) for at, word in enumerate(words) if word in ("--out", "--output_dir")}
        for path in paths:
            assert path in out or made & {path, *path.parents}, (name, path)
        assert out & {product, *product.parents}, name
        made |= {product, product.parent} if product.name == "recipe.json" else {product}


def test_no_two_steps_write_into_one_directory(steps):
    made = [
        words[words.index(key) + 1] for _, words in steps.values() for key in ("--out", "--output_dir") if key in words
    ]
    assert len(made) == len(steps) == len(set(made))


def test_methods_differ_in_what_they_compare_and_in_nothing_else(program):
    keys = {change.split("=")[0] for changes in program["METHODS"].values() for change in changes}
    assert keys == {f"stages.prefer.{name}" for name in ("preset", "loss_type", "anchor_weight")}
    presets = {name: changes[0].split("=")[1] for name, changes in program["METHODS"].items()}
    assert presets.pop("sft") == "dpo"
    assert {name: name.split("_")[0] for name in presets} == presets and set(presets.values()) < set(PRESETS)


def test_the_plan_can_be_changed_as_the_steps_do(program):
    document = yaml.safe_load((ROOT / program["PLAN"]).read_text(encoding="utf-8"))
    for change in ("model=DIR", "seed=3", "stages.prefer.data={mixture: x.yaml}", *program["METHODS"]["sft"]):
        apply_change(document, change)
    assert document["model"] == "DIR" and document["stages"][0]["loss_type"] == "sft"


def test_only_a_trained_quickstart_is_taken(program, tmp_path):
    with pytest.raises(CheckpointError, match="holds no trained quickstart"):
        program["seed_of"](tmp_path)


def test_a_done_step_is_not_done_again(program, tmp_path, monkeypatch):
    """And one that failed is said to have."""
    lines = []
    done, failing = tmp_path / "seed3" / "done.json", tmp_path / "seed3" / "failing.json"
    steps = {"done": (done, ["one"]), "failing": (failing, ["two"])}
    experiment = program["experiment"]
    monkeypatch.setitem(experiment.__globals__, "steps", lambda *_: steps)
    monkeypatch.setitem(
        experiment.__globals__, "subprocess", argparse.Namespace(run=lambda line, cwd: run(line, lines))
    )
    done.parent.mkdir()
    done.write_text("{}")
    with pytest.raises(MllmError, match="ended with status 3"):
        experiment(3, tmp_path, argparse.Namespace(out=tmp_path, methods=[]))
    assert lines == [["two"]]


def run(line, lines):
    lines.append(line)
    return argparse.Namespace(returncode=3)
