"""The benchmark of pruning: its clocks, its arithmetic, and one run that is too small to mean anything."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mllm.pruning import PRUNERS, Uniform, build_pruner
from mllm.pruning.forward import Forward

ROOT = Path(__file__).parents[2]


@pytest.fixture
def part(monkeypatch):
    """A module of the benchmark, by name."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return lambda name: importlib.import_module(f"pruning_benchmark.{name}")


@pytest.fixture
def subject(part):
    return part("shapes").make_subject("llava-1.5", "quick", torch.device("cpu"))


def test_the_smallest_busy_batch_is_found(part):
    search = part("batches").smallest_busy_batch
    assert search(lambda batch: float(batch)) == 1
    assert search(lambda batch: max(8.0, batch)) == 8
    assert search(lambda batch: 1.0, most=16) == 16
    assert search(lambda batch: 1.0 if batch <= 4 else None) == 4


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_on_a_cpu_is_counted_and_what_a_causal_kernel_skips_is_told(part, is_causal):
    queries, keys = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    with part("arithmetic").counting() as counted:
        torch.nn.functional.scaled_dot_product_attention(queries, keys, keys, is_causal=is_causal)
    with part("arithmetic").counting() as by_hand:
        (queries @ keys.transpose(2, 3)).softmax(dim=-1) @ keys
    assert counted.total == by_hand.total == by_hand.done == 2 * 2 * 3 * 5 * 5 * (8 + 8)
    assert counted.done == counted.total // (2 if is_causal else 1)


def test_calls_inside_of_calls_are_not_counted_twice(part, monkeypatch):
    clock = part("clock")
    ticks = iter(range(100))
    monkeypatch.setattr(clock, "now", lambda: float(next(ticks)))
    watch = clock.Stopwatch()
    watch.timed(watch.timed(lambda: None))()
    assert watch.seconds == 1.0
    with pytest.raises(ZeroDivisionError):
        watch.timed(lambda: 1 / 0)()
    assert watch.seconds == 2.0


@pytest.mark.parametrize("spec", ["uniform tokens=2", "visiondrop tokens=9", "fastv tokens=30", "crossget tokens=12"])
def test_taking_the_time_of_decisions_leaves_nothing_behind(part, subject, spec):
    before, pruner = dict(vars(Forward)), build_pruner(spec)
    names = vars(pruner).keys()
    found = part("runs").time_decisions(subject.model, subject.inputs, pruner)
    assert 0 < found["deciding"] < found["pruner_work"]
    assert dict(vars(Forward)) == before
    assert vars(pruner).keys() == names


def test_all_that_decides_is_timed(part):
    clock, pruner = part("clock"), Uniform(tokens=2)
    modules = [one for name, one in sys.modules.items() if name.startswith("mllm.pruning")]
    own = {(module, name): vars(module)[name] for module in modules for name in clock.READING if name in vars(module)}
    assert {name for _, name in own} == set(clock.READING)
    with clock.timing_decisions(pruner):
        assert not any(vars(module)[name] is function for (module, name), function in own.items())
        assert set(clock.DECIDING) <= set(vars(pruner))
    assert all(vars(module)[name] is function for (module, name), function in own.items())


def test_an_answer_is_timed_from_its_start_to_each_of_its_tokens(part, subject):
    found = part("runs").time_answer(subject.model, subject.repeated(2), None, new_tokens=3)
    assert 0 < found["prefill"] < found["ttft"] < found["end_to_end"]
    assert found["end_to_end"] == pytest.approx(found["ttft"] + 2 * found["decode"])


@pytest.mark.parametrize("shape", ["llava-1.5", "llava-next"])
def test_shapes_have_the_tokens_that_are_stated(part, shape):
    subject = part("shapes").make_subject(shape, "quick", torch.device("cpu"))
    lines = {"llava-1.5": 0, "llava-next": 2 * 6}[shape]
    assert subject.of == {"llava-1.5": 36, "llava-next": 180}[shape]
    (items, text), again = part("runs").lengths_of_rows(subject.model, subject.repeated(2))
    assert (items, text) == again == ([subject.of + lines], 64)
    full = [part("shapes").SHAPES[name]["views"] * (336 // 14) ** 2 for name in ("llava-1.5", "llava-next")]
    assert full == [576, 2880]


def test_counts_are_those_of_a_prompt_of_the_batch(part, subject):
    count = part("runs").count_prompt
    one, two = (count(subject.model, subject.repeated(rows), Uniform(tokens=4)) for rows in (1, 2))
    assert one == two
    assert one["tokens_per_layer"] == [64 + 4] * 4
    assert one["cache_bytes"] == 4 * 2 * (64 + 4) * 32 * 4  # layers, keys and values, tokens, width, float32


def test_gains_are_those_of_medians(part, subject):
    cases = part("cases")
    whole = {
        "flops": 90.0,
        "flops_done": 80.0,
        "text_flops": 60.0,
        "text_flops_done": 50.0,
        "text_flops_planned": 60.0,
    }
    less = {name: value / 3 for name, value in whole.items()}

    def candidate(spec, counted, seconds, decisions):
        trials = [dict.fromkeys(("ttft", "prefill", "end_to_end", "decode", "peak_mib"), one) for one in seconds]
        taken = [{"deciding": one, "pruner_work": 2 * one} for one in decisions]
        return cases.Candidate(spec, 4, counted, trials, taken)

    plain = candidate("none", whole, [8.0, 90.0, 4.0], [])
    found = cases.case_of(candidate("uniform", less, [4.0, 1.0, 60.0], [0.4, 0.2, 7.0]), plain, subject, 2)
    assert [found[key] for key in ("method", "tokens", "of", "batch")] == ["uniform", 4, 36, 2]
    assert (found["ttft_gain"], found["flops_gain"]) == (2.0, 3.0)
    assert found["of_flops_gain"] == pytest.approx(2 / 3)
    assert found["selection_share"] == pytest.approx(0.4 / 8)
    assert found["pruner_share"] == pytest.approx(0.8 / 8)
    assert found["flops_gain_planned"] == (30 + 60) / (30 + 20)
    assert found["decode_tokens_per_second"] == 0.5
    assert cases.case_of(plain, plain, subject, 2)["ttft_gain"] == 1.0


def test_methods_that_cannot_are_told_with_their_reason(part, subject):
    found = part("cases").measure(
        subject, ["uniform", "uniform nonsense=1"], repeats=1, new_tokens=2, say=lambda _: None
    )
    assert [(case["method"], case["tokens"]) for case in found] == [
        ("none", 36),
        *[("uniform", 12)] * 2,
        *[("uniform", 4)] * 2,
    ]
    refused = [case for case in found if "refused" in case]
    assert all("nonsense" in case["refused"] for case in refused)
    assert len(refused) == len(subject.budgets)
    machine = {"versions": {}, "gpu": None, "processor": "p", "threads": 1, "time": "t", "load_before": 0.0}
    assert part("report").table(found, machine).count(refused[0]["refused"]) == len(refused)


@pytest.mark.slow
def test_quick_run_writes_all_cases(tmp_path):
    out = tmp_path / "quick.json"
    command = [sys.executable, ROOT / "scripts" / "benchmark_pruning.py", "--quick", "--threads", "1", "--out", out]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=600)
    cases = json.loads(out.read_text(encoding="utf-8"))
    measured = {case["method"] for case in cases if case["ttft_gain"]}
    assert {"none", "visiondrop", "random", "uniform"} <= measured
    assert {case["method"] for case in cases} == {"none", *PRUNERS}
    assert {case["of"] for case in cases} == {36, 180}
    for case in cases:
        assert {"method", "tokens", "of", "ttft_gain", "flops_gain", "selection_share", "accuracy"} <= set(case)
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("| none |") == 2
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
