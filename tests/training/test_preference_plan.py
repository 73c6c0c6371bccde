"""Preference training as a stage of a plan, and what a dry run tells of it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mllm import load_model
from mllm.errors import CheckpointError, OptionError
from mllm.load import merged
from mllm.testing import save_tiny_parts, save_tiny_rows
from mllm.testing_pairs import save_tiny_pairs
from mllm.training.plan import read_plan

LORA = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Rows, pairs, and a plan: adapters, then preferences that start from them."""
    root = tmp_path_factory.mktemp("plan")
    save_tiny_rows(root / "rows")
    save_tiny_pairs(root / "pairs")
    sft = {"name": "sft", "parts": LORA, "data": ["rows/rows.jsonl"], "max_steps": 2}
    rdpo = {"name": "align", "program": "rdpo", "preset": "rdpo", "parts": LORA, "data": ["pairs/pairs.jsonl"]}
    plan = {
        "model": save_tiny_parts(root), "seed": 3, "use_cpu": True, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "logging_steps": 1, "stages": [sft, rdpo | {"max_steps": 3}],
    }  # fmt: skip
    (root / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory, run_plan) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run_plan(world / "plan.yaml", out) == ["sft", "align"]
    return out


def test_preferences_start_from_the_stage_before_and_have_it_as_reference(finished):
    """The reference is the merged model, so the first loss is a coin's toss for each comparison."""
    base = load_file(finished / "align" / "base" / "model.safetensors")
    expected = merged(load_model(finished / "sft" / "final")).state_dict()
    assert all(torch.equal(base[name], expected[name]) for name in base)
    first = json.loads((finished / "align" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(2 * 0.6931471805599453, abs=1e-6) and "accuracies/visual" in first


def test_stages_equal_the_same_runs_by_hand(world, finished, tmp_path, train_by_hand):
    arguments = ["--config", str(world / "plan.yaml"), "--stage", "align"]
    out = ["--model", str(finished / "sft" / "final"), "--output_dir", str(tmp_path / "align")]
    train_by_hand([*arguments, *out], "rdpo")
    runs = (finished / "align", tmp_path / "align")
    one, other = (load_file(run / "final" / "adapter_model.safetensors") for run in runs)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_finished_stages_are_skipped_while_they_are_what_they_were(world, finished, run_plan):
    assert run_plan(world / "plan.yaml", finished) == []
    record = json.loads((finished / "plan.json").read_text())
    assert [stage["status"] for stage in record["stages"]] == ["skipped", "skipped"]
    with pytest.raises(CheckpointError, match="options: beta = None, now 0.2|options: beta"):
        run_plan(world / "plan.yaml", finished, "stages.align.beta=0.2")


def test_a_stage_knows_its_program_and_its_options(world, tmp_path):
    plan = read_plan(world / "plan.yaml", output_dir=tmp_path)
    assert [stage.program for stage in plan.stages] == ["sft", "rdpo"]
    with pytest.raises(OptionError, match="unknown option 'preset'"):
        read_plan(world / "plan.yaml", output_dir=tmp_path, changes=["stages.align.program=sft"])
    with pytest.raises(OptionError, match="program = 'dpo'.*\nexpected: one of sft, rdpo"):
        read_plan(world / "plan.yaml", output_dir=tmp_path, changes=["stages.align.program=dpo"])
    with pytest.raises(OptionError, match="stage 'align'.*|contrast = 'none'"):
        read_plan(world / "plan.yaml", output_dir=tmp_path, changes=["stages.align.contrast=none"])


@pytest.fixture(scope="module")
def look(prefer):
    """Make a dry run of these options; returns its report."""

    def start(output_dir: Path, **options) -> dict:
        prefer(output_dir, **{"dry_run": True, "max_steps": -1, "num_train_epochs": 2, **options})
        return json.loads((output_dir / "preflight.json").read_text())

    return start


@pytest.mark.parametrize("batching", ["random", "length", "packed"])
def test_a_dry_run_tells_what_the_run_then_does(look, prefer, tmp_path, batching):
    options = {"batching": batching, "max_steps": -1, "num_train_epochs": 2}
    options |= {"pack_length": 300, "per_device_train_batch_size": None} if batching == "packed" else {}
    told = look(tmp_path / "run", **options)
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["preflight.json"]
    run = prefer(tmp_path / "run", **options)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    assert len(steps) == told["steps"]["total"]
    seen = sum(line["tokens_per_second"] * line["seconds_per_step"] for line in steps)
    assert seen == pytest.approx(2 * told["plan"]["tokens"]) and told["plan"]["tokens"] == told["lengths"]["total"]


def test_a_dry_run_shows_all_sides_of_a_pair(look, tmp_path, capsys):
    report = look(tmp_path / "run", preset="rdpo")
    shown = capsys.readouterr().out
    assert report["batch"]["text"].count("[[There is") == 3 and "[[There is" in shown
    assert report["batch"]["shapes"]["image_places"] == "int64 [6]"
    assert report["batch"]["shapes"]["pixel_values"] == "float32 [4, 3, 16, 16]"


def test_a_dry_run_counts_the_weights_of_a_reference_of_its_own(look, assembled, tmp_path):
    reports = [
        look(tmp_path / name, parts=parts, **options)["memory"]["weights"]
        for name, parts, options in (
            ("lora", {"text": "lora"}, {}),
            ("named", {"text": "lora"}, {"reference": str(assembled)}),
            ("full", {"text": "full"}, {}),
            ("known", {"text": "full"}, {"precompute_ref_log_probs": True}),
        )
    ]
    assert reports[1] == 2 * reports[0] and reports[2] == 2 * reports[3]


def test_a_dry_run_finds_what_the_run_would(look, rows, tmp_path):
    with pytest.raises(ValueError, match="no preference"):
        look(tmp_path / "rows", data=[str(rows)])
    with pytest.raises(CheckpointError):
        look(tmp_path / "reference", reference=str(tmp_path / "nowhere"))
