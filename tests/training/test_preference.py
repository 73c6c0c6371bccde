"""`train/rdpo.py`, run in this process."""

import json
import math

import pytest


@pytest.mark.parametrize(
    "batching", [{}, {"batching": "packed", "pack_length": 512, "per_device_train_batch_size": None}]
)
@pytest.mark.parametrize(("preset", "twos"), [("dpo", 1), ("rdpo", 2), ("mdpo", 3)])
def test_before_the_first_step_nothing_is_preferred(prefer, tmp_path, preset, twos, batching):
    """Policy and reference are the same: each comparison is a coin that costs ln 2."""
    prefer(tmp_path / "run", preset=preset, max_steps=1, **batching)
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(twos * math.log(2), abs=1e-6)


@pytest.mark.parametrize("preset", ["dpo", "rdpo", "mdpo", "vdpo"])
def test_what_is_preferred_becomes_likelier(prefer, tmp_path, preset):
    prefer(tmp_path / "run", preset=preset, max_steps=20, learning_rate=1e-2, per_device_train_batch_size=8)
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-2])
    assert last["accuracies/text"] == 1.0
    assert preset != "rdpo" or last["accuracies/visual"] == 1.0  # a crop of a plain picture looks like it
