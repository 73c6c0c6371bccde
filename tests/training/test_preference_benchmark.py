"""The benchmark of preference training: its pairs, its arithmetic, and one run that is too small to mean anything."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def part(monkeypatch):
    """A module of the benchmark, by name."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return lambda name: importlib.import_module(f"training_benchmark.{name}")


def test_pairs_are_the_same_every_time(part, tmp_path):
    first, second = (part("pairs").make_pairs(tmp_path / name, 6) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    for image in (tmp_path / "a" / "images").iterdir():
        assert image.read_bytes() == (tmp_path / "b" / "images" / image.name).read_bytes()


def test_the_answers_of_a_pair_have_one_length_and_differ(part, tmp_path):
    rows = [json.loads(line) for line in part("pairs").make_pairs(tmp_path, 6).read_text().splitlines()]
    for row in rows:
        chosen, rejected = (row[side]["content"].split(" ") for side in ("chosen", "rejected"))
        changed = sum(one != other for one, other in zip(chosen, rejected, strict=True))
        assert 0 < changed <= len(chosen) // part("pairs").CHANGED
        assert row["media"] != row["contrast"]


def test_ratios_are_those_of_medians_and_the_pass_is_spread_over_epochs(part):
    def trials(seconds, **own):
        said = {"log_probs": {"chosen": [-3.0, 0.0], "rejected": [-4.0, 0.0]}, "peak_mib": 1.0, "cuda_peak_mib": None}
        return [said | {"step_seconds": one, "batches": {"rows": [2]}, "pass_seconds": 12.0} | own for one in seconds]

    found = part("preferences").summarized(
        {"steps": 4},
        {
            "trl": trials([2.0, 9.0, 1.0]),
            "dpo": trials([1.0, 1.0, 7.0]),
            "rdpo": trials([3.0]),
            "dpo_live": trials([1.5]),
            "rdpo_live": trials([2.5], log_probs={"chosen": [-3.0], "rejected": [-4.5]}),
        },
    )
    assert [found[key] for key in ("dpo_step_ratio", "rdpo_step_ratio")] == [0.5, 1.5]
    assert [found[key] for key in ("dpo_live_ratio", "rdpo_live_ratio")] == [0.75, 1.25]
    assert [found[f"dpo_ratio_with_pass_over_{epochs}"] for epochs in (1, 3)] == [2.0, 1.0]
    assert found["first_log_probs_largest_difference"] == 0.5


@pytest.mark.slow
def test_both_sides_score_the_same_tokens(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "scripts" / "benchmark_preference.py", "--quick", "--threads", "1"]
    subprocess.run([*command, "--out", tmp_path / "quick.json"], env=environment, check=True, timeout=300)
    found = json.loads((tmp_path / "quick.json").read_text())
    assert found["first_log_probs_largest_difference"] < 1e-2
    batches = found["batches"]
    assert [batches[name]["rows"] for name in ("trl", "dpo", "rdpo")] == [4, 4, 6]
    assert [batches[name]["images"] for name in ("trl", "dpo", "rdpo")] == [4, 2, 4]
    assert batches["trl"]["padded_length"] == batches["dpo"]["padded_length"] == batches["rdpo"]["padded_length"]
    for key in ("rdpo_step_ratio", "dpo_step_ratio", "rdpo_live_ratio", "dpo_live_ratio"):
        assert found[key] > 0
