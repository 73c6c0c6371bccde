"""The benchmark: its rows, its arithmetic, and one whole run that is too small to mean anything."""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2ForCausalLM

ROOT = Path(__file__).parents[2]
RATIOS = ("rows_per_second_ratio", "peak_memory_ratio", "cached_alignment_of_bound")
SHARES = {"decode", "preprocess", "collate", "encoder", "connector", "llm", "head", "optimizer", "other"}
SIDES = {"trl", "our"}


@pytest.fixture
def part(monkeypatch):
    """A module of the benchmark, by name."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return lambda name: importlib.import_module(f"training_benchmark.{name}")


def test_rows_are_the_same_every_time(part, tmp_path):
    first, second = (part("mixture").make_mixture(tmp_path / name, 20) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    images = sorted((tmp_path / "a" / "images").iterdir())
    assert [image.read_bytes() for image in images] == [
        image.read_bytes() for image in sorted((tmp_path / "b" / "images").iterdir())
    ]


def test_rows_have_the_shares_that_are_stated(part, tmp_path):
    mixture = part("mixture")
    rows = [json.loads(line) for line in mixture.make_mixture(tmp_path, 20).read_text(encoding="utf-8").splitlines()]
    counts = {kind: sum(row["source"] == kind for row in rows) for kind in mixture.SHARES}
    assert counts == {kind: share * 20 for kind, share in mixture.SHARES.items()}
    assert all(bool(row["media"]) == (row["source"] != "text") for row in rows)


def test_memory_is_measured_on_the_shortest_and_the_longest_row(part):
    lengths = [5, 1, 9, 3, 7]
    assert part("comparison").spread_places(lengths, 3) == [0, 1, 2]
    assert part("comparison").spread_places(lengths, 5) == [0, 1, 2, 3, 4]


def test_the_full_plan_compares_like_with_like(part, monkeypatch, tmp_path):
    """All measures but those that need models, with trials that tell a speed by their size."""
    comparison, specs = part("comparison"), []
    monkeypatch.setattr(comparison, "make_checkpoint", lambda directory, shape, rows: directory / shape)
    spec = importlib.util.spec_from_file_location("program", ROOT / "scripts" / "benchmark_training.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    def trial(asked):
        specs.append(asked)
        rows = asked["num_rows"]
        if asked["side"] == "tokens":
            lengths = list(range(300, 300 + rows))
            equal = dict.fromkeys(("rows", "rows_of_trl", "rows_with_equal_labels"), rows)
            return {"tokens": {"row_lengths": lengths, "lengths": {}, "orders": [list(range(rows))] * 8} | equal}
        speed = {"trl": 1.0, "our": 3.0}[asked["side"]] / asked.get("batch_rows", 1) + asked["workers"]
        return asked | {"rows_per_second": speed, "peak_mib": 10.0 * speed, "losses": [2.0, 1.0], "shares": {}}

    figures: dict = {}
    for name in ("tokens", "speed", "losses", "shares", "memory"):
        figures |= program.MEASURES[name](program.FULL, tmp_path, trial, figures)

    assert figures["best"]["trl"] == {"side": "trl", "batch_rows": 1, "workers": 2}
    assert figures["best"]["our"] == {"side": "our", "batching": "packed", "pack_length": 1024, "workers": 2}
    assert figures["rows_per_second_ratio"] == 5 / 3
    assert figures["peak_memory_ratio"] == figures["peak_memory_ratio_lora"] == 3.0
    shared = ("model", "rows", "step_rows", "learning_rate", "bf16")
    for found in (
        figures["trials"]["final"],
        figures["memory"]["full"]["fastest"],
        figures["memory"]["lora"]["fastest"],
    ):
        trials = [one for group in found.values() for one in (group if isinstance(group, list) else [group])]
        assert len({tuple(one[name] for name in shared) for one in trials}) == 1
    assert {one["mode"] for one in specs if "mode" in one} == {"full", "lora"}


def test_a_call_inside_a_timed_call_is_not_counted_twice(part, monkeypatch):
    shares = part("shares")
    ticks = iter(range(100))
    monkeypatch.setattr(shares, "now", lambda: float(next(ticks)))
    clock = dict.fromkeys(("work", "work runs"), 0.0)
    inner = shares.timed(lambda: None, clock, "work")
    shares.timed(inner, clock, "work")()
    assert clock["work"] == 1.0


def test_flops_of_a_row_are_those_that_torch_counts(part):
    checkpoints, utilisation = part("checkpoints"), part("utilisation")
    shape, length = checkpoints.SHAPES["quick"], 32
    config = checkpoints.make_text_config(shape["text"], eos_token_id=None, pad_token_id=None)
    llm = Qwen2ForCausalLM._from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        llm(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False).logits.sum().backward()
    # Eager attention computes the half that a causal mask takes away, too.
    masked = 3 * 2 * shape["text"]["layers"] * shape["text"]["hidden_size"] * length**2
    found = utilisation.flops_of_row(shape, length=length, supervised=length, images=0)
    assert found == counter.get_total_flops() - masked


@pytest.mark.slow
def test_quick_run_writes_all_figures(tmp_path):
    pytest.importorskip("trl")
    out = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_training.py"), "--out", str(out), "--quick"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "--threads", "1"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads(out.read_text(encoding="utf-8"))

    assert all(isinstance(figures[name], float) and math.isfinite(figures[name]) for name in RATIOS)
    assert figures["quick"] is True
    assert {"processor", "cores", "threads", "versions", "load_before"} <= set(figures["machine"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    # Both sides learn the same tokens, and so the same.
    tokens = figures["tokens"]
    assert tokens["rows"] == tokens["rows_of_trl"] == tokens["rows_with_equal_ids"] == tokens["rows_with_equal_labels"]
    assert tokens["supervised_tokens"] == tokens["supervised_tokens_of_trl"] > 0
    assert figures["loss_curves_largest_difference"] < 1e-4
    assert len(figures["loss_curves"]) == 3

    assert set(figures["trials"]["final"]) >= SIDES
    for trials in figures["trials"]["final"].values():
        assert all(one["rows_per_second"] > 0 and one["peak_mib"] > 0 for one in trials)
        assert {one["classes"][1] for one in trials} == {"LlavaForConditionalGeneration"}
    for sides in figures["shares"].values():
        assert all(
            set(shares) == SHARES and sum(shares.values()) == pytest.approx(1, abs=1e-2) for shares in sides.values()
        )
    for model in figures["alignment"].values():
        uncached, cached = (model["trials"][name][0] for name in ("uncached", "cached"))
        assert cached["shares"]["encoder"] == cached["shares"]["decode"] == 0 < uncached["shares"]["encoder"]
        assert cached["losses"] == pytest.approx(uncached["losses"], abs=1e-5)
