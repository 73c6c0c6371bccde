"""A dry run tells what the run then does, and leaves nothing behind but its report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mllm.data.auditing.batch_text import tokens_text
from mllm.errors import CheckpointError, OptionError
from mllm.load import load_processor
from mllm.testing import save_tiny_parts, save_tiny_rows
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.training.preflight.data_facts import padded_size, plan_facts
from mllm.training.preflight.memory import (
    Layers,
    Sharding,
    activation_numbers,
    kept_numbers,
    logit_bytes,
    media_positions,
    parameter_bytes,
)

PARTS = {"image.connector": {"mode": "full", "learning_rate": 3e-3}, "text": {"mode": "lora", "rank": 4}}
EPOCH = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.fixture(scope="module")
def look(train):
    """Make a dry run of these options; returns its report."""

    def start(output_dir: Path, **options) -> dict:
        train(output_dir, **{"parts": PARTS, "dry_run": True, **options})
        return json.loads((output_dir / "preflight.json").read_text())

    return start


def test_it_writes_its_report_and_nothing_else_and_says_it_in_words(look, tmp_path, capsys):
    tiny = save_tiny_parts(tmp_path / "tiny")
    report = look(tmp_path / "run", model=tiny)
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["preflight.json"]
    shown = capsys.readouterr().out
    for title in ("parts", "optimiser", "adapters", "data", "lengths", "micro-batches", "steps", "memory", "first"):
        assert f"\n{title}" in f"\n{shown}"
    assert "text             lora        44,960    4,096" in shown
    assert "text: 14 modules: model.language_model.layers.0." in shown
    assert "[[a red 3" in shown and "<image> x 4" in shown
    assert report["model_class"] == "MllmForConditionalGeneration"


@pytest.mark.parametrize("batching", ["random", "length"])
def test_the_run_does_what_was_told(look, train, rows, tmp_path, batching):
    validated = {"eval_data": [str(rows)], "eval_strategy": "steps", "eval_steps": 2}
    told = look(tmp_path / "run", **EPOCH, **validated, batching=batching)
    run = train(tmp_path / "run", parts=PARTS, **EPOCH, **validated, batching=batching, logging_steps=2)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    assert (first["step"], first["epoch"]) == (told["steps"]["per_epoch"], 1.0) == (2, 1.0)
    assert told["steps"]["total"] == max(line["step"] for line in lines) == 4
    seconds = first["seconds_per_step"] * 2
    assert first["tokens_per_second"] * seconds == pytest.approx(told["plan"]["tokens"])
    assert told["steps"]["tokens_per_step"] * 2 == told["plan"]["tokens"] == told["lengths"]["total"]
    assert first["padding_share"] == pytest.approx(told["plan"]["empty_share"])
    assert [source["used"] for source in told["validation"]] == [12]
    assert {name for name in first if name.startswith("grad_norm/")} == {
        f"grad_norm/{group['name'].split('/')[0]}" for group in told["groups"]
    }


def test_packs_are_told_as_they_are_made(look, train, tmp_path):
    options = {"batching": "packed", "pack_length": 120, "per_device_train_batch_size": 1, "logging_steps": 1}
    told = look(tmp_path / "run", **{**EPOCH, **options})
    plan = told["plan"]
    assert plan["slots"] == 120 * plan["micro_batches"] and plan["most_tokens"] <= 120
    assert plan["empty_share"] == pytest.approx(1 - told["lengths"]["total"] / plan["slots"])
    run = train(tmp_path / "run", parts=PARTS, **{**EPOCH, **options})
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == told["steps"]["total"]
    assert all(line["padding_share"] == 0 for line in lines if "loss" in line)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "qwen2_audio"])
def test_stock_models(look, tmp_path, family):
    kind = "audio" if family == "qwen2_audio" else "image"
    parts = {f"{kind}.connector": "full", "text": "lora"}
    report = look(tmp_path / "run", model=str(save_stock_checkpoint(tmp_path / "model", family)), parts=parts)
    modes = {part["name"]: part["mode"] for part in report["parts"]}
    assert modes == {f"{kind}.encoder": "frozen", f"{kind}.connector": "full", "text": "lora"}
    assert ("pixel_values" in report["batch"]["shapes"]) == (kind == "image")
    learned = report["batch"]["text"].partition("[[")[2]
    assert learned.strip().startswith("a red 3") and learned.strip().endswith("]]")
    dropped = {"image, for which the model has no tower": 8} if kind == "audio" else {}
    assert report["sources"][0]["dropped"] == dropped


def test_parts_and_groups(look, tmp_path):
    report = look(tmp_path / "run", weight_decay=0.1, learning_rate=2e-4)
    encoder, connector, text = report["parts"]
    assert (encoder["name"], encoder["mode"], encoder["trained"], encoder["learning_rate"]) == (
        "image.encoder", "frozen", 0, None
    )  # fmt: skip
    assert (connector["trained"], connector["learning_rate"]) == (connector["parameters"], 3e-3)
    # In two layers of rank 4: 2 projections of 32 x 32, 2 of 32 x 16, 3 of 32 x 64
    assert text["trained"] == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert (text["num_adapted"], text["num_layers"]) == (14, 2)
    groups = {group["name"]: group for group in report["groups"]}
    assert sum(group["parameters"] for group in report["groups"]) == connector["trained"] + text["trained"]
    assert groups["text/decayed"]["weight_decay"] == 0.1 and groups["text/decayed"]["learning_rate"] == 2e-4
    assert groups["image.connector/not decayed"]["weight_decay"] == 0.0


def test_every_source_says_what_is_left_out_and_why(look, tmp_path):
    long, short = save_tiny_rows(tmp_path / "long", 10), save_tiny_rows(tmp_path / "short", 6)
    sources = [str(long), {"path": str(short), "take": "first:5", "weight": 2}]
    report = look(tmp_path / "run", data=sources, max_length=45)
    lengths = {}
    for path in (long, short):
        processor = load_processor(report["model"])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        sizes = [[(item["height"], item["width"]) for item in row["media"]] for row in rows]
        encoded = [
            processor.encode_chat(row["messages"], media_sizes=size, where="the test")
            for row, size in zip(rows, sizes, strict=True)
        ]
        lengths[path] = [len(chat.input_ids) for chat in encoded]
    first, second = report["sources"]
    num_long = sum(length > 45 for length in lengths[long])
    assert 0 < num_long < 10
    assert first["rows"] == 10 and first["used"] == 10 - num_long == first["per_epoch"]
    assert first["dropped"] == {"longer than max_length": num_long}
    assert second["rows"] == 5 and second["used"] == sum(length <= 45 for length in lengths[short][:5])
    kept = [length for length in [*lengths[long], *lengths[short][:5]] if length <= 45]
    figures = report["lengths"]
    assert (figures["shortest"], figures["longest"], figures["total"]) == (min(kept), max(kept), sum(kept))
    assert sum(figures["counts"]) == len(kept) and figures["edges"][-1] > max(kept) >= figures["edges"][-2]


def test_a_run_that_is_there_is_told_and_must_be_the_same(look, train, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "parts": {"image.connector": "full"}}
    run = train(tmp_path / "run", **options)
    before = sorted(run.rglob("*"))
    steps = look(run, **options)["steps"]
    assert steps["goes_on_from"] == "checkpoint-2" and steps["is_finished"]
    assert sorted(run.rglob("*")) == sorted([*before, run / "preflight.json"])
    with pytest.raises(CheckpointError, match="max_steps = 2, now 3"):
        look(run, **{**options, "max_steps": 3})


def test_what_the_run_would_refuse_is_refused(look, tmp_path):
    with pytest.raises(OptionError, match="every part is frozen"):
        look(tmp_path / "run", parts={"text": "frozen"})
    with pytest.raises(OptionError, match="no row left of 12"):
        look(tmp_path / "run", max_length=3)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="thesis.tex"):
        look(tmp_path)
    assert not (tmp_path / "run").exists()


def test_one_of_two_ranks_speaks_for_both(look, tmp_path, two_ranks, capfd):
    two_ranks(look_on_two_ranks, look, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert report["plan"]["world_size"] == 2 and report["plan"]["micro_batches"] == 3
    assert report["plan"]["rows"] == 12 and report["steps"]["per_epoch"] == 3
    assert capfd.readouterr().out.count("memory of a rank") == 1


def look_on_two_ranks(look, output_dir: Path) -> None:
    try:
        look(output_dir)
    except FileNotFoundError:  # the rank that has nothing to say does not wait for the other one's report
        assert torch.distributed.get_rank() == 1


def test_a_plan_in_figures():
    lengths = np.array([3, 5, 2, 4])
    steps = [[np.array([0, 1]), np.array([2])], [np.array([3]), np.array([], np.int64)]]

    class Plan(list):
        def __call__(self, epoch):
            return iter(self)

    facts, first, largest = plan_facts(Plan(steps), lengths, batching="random", world_size=2, pack_length=None)
    assert (facts.micro_batches, facts.rows, facts.tokens, facts.slots) == (2, 4, 14, 10 + 2 + 4)
    assert facts.empty_share == pytest.approx(2 / 16)
    assert (facts.fewest_rows, facts.most_rows, facts.most_tokens) == (0, 2, 10)
    assert facts.imbalance == pytest.approx((8 / 5 - 1 + 2 - 1) / 2)
    assert first is steps[0] and largest is steps[0][0]

    packed, _, _ = plan_facts(Plan(steps), lengths, batching="packed", world_size=2, pack_length=8)
    assert (packed.slots, packed.most_tokens, packed.empty_share) == (32, 8, pytest.approx(18 / 32))
    assert padded_size(np.array([], np.int64)) == 0


TWO = Layers(widths=(10, 20), inputs=(2, 3), first_trained=0)
FROZEN = Layers(widths=(10, 20), inputs=(2, 3), first_trained=None)


def test_what_the_backward_needs():
    assert kept_numbers(TWO, has_gradient=False) == 30
    assert kept_numbers(FROZEN, has_gradient=False) == 0 and kept_numbers(FROZEN, has_gradient=True) == 30
    upper = Layers(widths=(10, 20), inputs=(2, 3), first_trained=1)
    assert kept_numbers(upper, has_gradient=False) == 20 and kept_numbers(upper, has_gradient=True) == 30
    checkpointed = Layers(widths=(10, 20), inputs=(2, 3), first_trained=0, is_checkpointed=True)
    assert kept_numbers(checkpointed, has_gradient=False) == 2 + 3 + 20
    connector = Layers(widths=(7,), inputs=(3,), first_trained=0)
    # A frozen encoder keeps nothing; behind a trained connector the whole language model does, also a frozen one.
    assert activation_numbers([[(FROZEN, 100), (connector, 50)]], (FROZEN, 9)) == 50 * 7 + 9 * 30
    assert activation_numbers([[(FROZEN, 0), (connector, 0)]], (FROZEN, 9)) == 0


def test_bytes_of_what_is_trained_and_of_what_is_not():
    model = nn.Sequential(nn.Linear(10, 1, bias=False), nn.Linear(5000, 1, bias=False))
    model[1].requires_grad_(False)
    plain = {"optim": "adamw_torch", "sharding": Sharding()}
    assert parameter_bytes(model, **plain) == (4 * 5010, 40, 80)
    assert parameter_bytes(model.bfloat16(), **plain) == (2 * 5010, 20, 40)
    model.float()[1].requires_grad_(True)
    # 8 bit: one byte for each of two moments, but four in small tensors
    assert parameter_bytes(model, optim="adamw_8bit", sharding=Sharding())[2] == 2 * (4 * 10 + 5000)
    zero = Sharding(name="ZeRO-2", gradients=4, optimizer=4, is_half=True)
    assert parameter_bytes(model, optim="adamw_torch", sharding=zero) == (2 * 5010, 2 * 5010 // 4, 12 * 5010 // 4)


def test_positions_of_media():
    patches = nn.Sequential(nn.Conv2d(3, 8, kernel_size=16, stride=16), nn.Linear(8, 8))
    assert media_positions(patches, torch.zeros(2, 3, 32, 32)) == 8
    assert media_positions(patches, None) == 0
    frames = nn.Sequential(nn.Conv1d(80, 8, 3, padding=1), nn.Conv1d(8, 8, 3, stride=2, padding=1))
    assert media_positions(frames, torch.zeros(2, 80, 3000)) == 3000


def test_logits_are_never_more_than_a_chunk():
    assert logit_bytes(10, 1000, device="cpu") == 40_000
    assert logit_bytes(10**6, 10**5, device="cpu") == 64 * 2**20


def test_tokens_as_text(assembled):
    tokenizer = load_processor(assembled).tokenizer
    ids = [*tokenizer.encode("Is there a"), *[9] * 5, *tokenizer.encode(" 5?\x1b")]
    known = tokenizer.decode([9])
    marks = [False] * (len(ids) - 1) + [True]
    assert tokens_text(tokenizer, ids, marks) == rf"Is there a{known} x 5 5?[[\x1b]]"
