"""How a run makes its micro-batches: packed, by length or at random; what cannot be packed, and what does not fit."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from mllm import load_model
from mllm.data import examples as examples_module
from mllm.data.batch_plan import LengthPlan, PackedPlan, RandomPlan
from mllm.data.collate import PackingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture
from mllm.errors import CheckpointError, OptionError, RowError
from mllm.load import load_processor, merged
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.training.arguments import build_arguments
from mllm.training.batching import encoder_share, epochs_of, pack_length, plan_batches
from mllm.training.start import encode_rows

PACKED = {"batching": "packed", "pack_length": 110, "per_device_train_batch_size": None}
LENGTH = {"batching": "length", "per_device_train_batch_size": 3}


@pytest.fixture
def arguments(assembled, rows, tmp_path):
    """Options of a run, on the tiny model and rows."""
    settled = {"model": str(assembled), "data": [str(rows)], "output_dir": str(tmp_path / "run"), "use_cpu": True}
    return lambda **options: build_arguments(settled | options, where="the test")


@pytest.fixture
def served(monkeypatch) -> list[list[str]]:
    """The rows of every batch, as they are made."""
    batches: list[list[str]] = []
    collate = PackingCollator.__call__

    def note(self, examples):
        batches.append([example.row.id for example in examples])
        return collate(self, examples)

    monkeypatch.setattr(PackingCollator, "__call__", note)
    return batches


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_row_is_trained_on_once_in_each_of_several_packed_epochs(train, tmp_path, served, accumulation):
    options = {"num_train_epochs": 5, "max_steps": -1, "gradient_accumulation_steps": accumulation}
    run = train(tmp_path / "run", parts={"image.connector": "full"}, logging_steps=1, **PACKED, **options)
    assert Counter(row for batch in served for row in batch) == {f"row-{number}": 5 for number in range(12)}
    assert all(served) and max(map(len, served)) > 1
    per_epoch = len(served) // 5
    for epoch in range(5):
        rows = [row for batch in served[epoch * per_epoch : (epoch + 1) * per_epoch] for row in batch]
        assert len(set(rows)) == len(rows) == 12
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in steps) == 5 * -(-per_epoch // accumulation)


@pytest.mark.parametrize(("options", "workers"), [(PACKED, 1), (LENGTH, 0)], ids=["packed", "length"])
def test_resumed_equals_straight(train, tmp_path, options, workers):
    """Stopped in the middle of an epoch, with dropout."""
    parts = {"image.connector": "full", "text": {"mode": "lora", "rank": 4, "dropout": 0.3}}
    options = options | {
        "parts": parts, "max_steps": 9, "save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": workers,
    }  # fmt: skip
    straight = train(tmp_path / "straight", **options)
    stopped = shutil.copytree(straight, tmp_path / "stopped")
    for name in ("checkpoint-8", "checkpoint-9", "final"):
        shutil.rmtree(stopped / name)
    train(stopped, **options)
    one, other = (merged(load_model(run / "final")).state_dict() for run in (straight, stopped))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_does_not_go_on_with_other_batches(train, tmp_path):
    train(tmp_path / "run", **PACKED, parts={"image.connector": "full"}, max_steps=1)
    for other in (LENGTH, PACKED | {"pack_length": 120}):
        with pytest.raises(CheckpointError, match="other options: .*(batching|pack_length)"):
            train(tmp_path / "run", **other, parts={"image.connector": "full"}, max_steps=1)


def test_two_ranks_of_packs_equal_one_process(train, two_ranks, tmp_path):
    """All twelve rows in every step, in packs that the two ranks share."""
    options = PACKED | {
        "parts": {"image.encoder": "full", "image.connector": "full", "text": {"mode": "lora", "rank": 4}},
        "optim": "sgd", "max_steps": 2, "gradient_accumulation_steps": 100,
    }  # fmt: skip
    train(tmp_path / "one", **options)
    two_ranks(_train_in_rank, train, tmp_path / "two", options)
    one, two = (merged(load_model(tmp_path / run / "final")).state_dict() for run in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5, msg=key)


def _train_in_rank(train, output_dir: Path, options: dict) -> None:
    train(output_dir, **options)


def test_the_plan_is_the_option_and_the_pack_length_that_of_rows(arguments, assembled):
    model = load_model(assembled)
    for options, kind in ((PACKED, PackedPlan), (LENGTH, LengthPlan), ({}, RandomPlan)):
        args = arguments(**options)
        assert type(plan_batches(args, _examples(args), model)) is kind
    assert pack_length(arguments(batching="packed", max_length=99)) == 99
    assert arguments(**PACKED).per_device_train_batch_size == 1


def test_a_row_longer_than_a_pack_is_named(arguments, assembled):
    args = arguments(batching="packed", pack_length=40)
    with pytest.raises(RowError, match=r"row-\d+.* has \d+ tokens, and pack_length is 40"):
        plan_batches(args, _examples(args), load_model(assembled))
    shorter = arguments(batching="packed", pack_length=40, max_length=40)
    plan_batches(shorter, _examples(shorter), load_model(assembled))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pack_length": 100}, "pack_length = 100 and batching = 'random'"),
        ({"batching": "packed", "per_device_train_batch_size": 4}, "decided by their lengths"),
        ({"batching": "packed", "max_length": None}, "without pack_length or max_length"),
        ({"batching": "dense"}, "one of random, length, packed"),
    ],
)
def test_options_that_contradict_each_other(arguments, options, message):
    with pytest.raises(OptionError, match=message):
        arguments(**options)


def test_a_large_mixture_is_counted_before_it_is_packed(arguments, assembled, monkeypatch):
    monkeypatch.setattr(examples_module, "ENCODED_AT_START", 5)
    processor, silent = load_processor(assembled), lambda what, total: None
    args = arguments(**LENGTH)
    rows = open_mixture(args.data)
    assert encode_rows(rows, args, processor, progress=silent).measure == "bounded"
    counted = encode_rows(rows, arguments(**PACKED), processor, progress=silent)
    assert counted.measure == "counted"
    plan = plan_batches(arguments(**PACKED), counted, load_model(assembled))
    assert sorted(row for step in plan(0) for batch in step for row in batch.tolist()) == list(range(12))


def test_a_model_that_cannot_be_packed_is_refused_before_the_run_begins(train, tmp_path):
    checkpoint = save_stock_checkpoint(tmp_path / "checkpoint", "gemma3")
    with pytest.raises(OptionError, match="batching: length"):
        train(tmp_path / "run", model=str(checkpoint), **PACKED, parts={"image.connector": "full"})
    assert not (tmp_path / "run" / "run.json").exists()


def test_epochs_are_counted_as_the_trainer_does(arguments):
    assert epochs_of(arguments(num_train_epochs=2.5), 7) == 3
    assert epochs_of(arguments(max_steps=9, gradient_accumulation_steps=2), 7) == 3  # 4 steps an epoch


def test_an_encoder_costs_what_its_weights_and_passes_say(arguments, assembled):
    model = load_model(assembled)
    weights = {
        name: sum(p.numel() for key, p in model.named_parameters() if key.startswith(name))
        for name in ("model.image_tower.encoder", "model.language_model", "lm_head")
    }
    text = weights["model.language_model"] + weights["lm_head"]
    frozen = model.requires_grad_(False)
    share = encoder_share(arguments(parts={"image.connector": "full"}), frozen)
    assert share == pytest.approx(weights["model.image_tower.encoder"] / (2 * text))
    whole = encoder_share(arguments(parts={"image.encoder": "full", "text": "full"}), model.requires_grad_(True))
    assert whole == pytest.approx(weights["model.image_tower.encoder"] / text)


def _examples(args) -> Examples:
    processor = load_processor(args.model)
    return Examples(open_mixture(args.data), processor, max_length=args.max_length)
