"""A run that was stopped and goes on ends as one that was not: weights, optimiser and log, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mllm.data.collate import PaddingCollator

FULL = {"image.encoder": "full", "image.connector": {"mode": "full", "learning_rate": 3e-3}, "text": "full"}
LORA = {"image.connector": "full", "text": {"mode": "lora", "rank": 4, "dropout": 0.3}}
ENCODER_BESIDE_LORA = {"image.encoder": "full", "text": {"mode": "lora", "rank": 4, "dropout": 0.3}}

# 12 rows in micro-batches of 2: 6 to an epoch. Accumulated by 4, an epoch is a step of 4 and one of 2 micro-batches.
ACCUMULATED = {"gradient_accumulation_steps": 4, "save_steps": 3}
BY_LENGTH = {"batching": "length", "gradient_accumulation_steps": 2, "save_steps": 4}
# Packs of two to four rows, two to a step: stopped in the second epoch.
PACKED = {
    "batching": "packed", "pack_length": 128, "max_length": 128, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2, "save_steps": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (FULL, {"save_steps": 4}),
        (FULL, ACCUMULATED),
        (LORA, {"save_steps": 4}),
        (LORA, {"save_steps": 6}),
        (LORA, ACCUMULATED),
        (LORA, {"save_steps": 4, "dataloader_num_workers": 1}),
        (ENCODER_BESIDE_LORA, {"save_steps": 8}),
        (FULL, BY_LENGTH),
        (LORA, PACKED),
    ],
    ids=["full", "full accumulated", "lora", "lora at an epoch's end", "lora accumulated", "lora with a data worker",
         "encoder beside lora", "full by length", "lora packed"],
)  # fmt: skip
def test_resumed_equals_straight(train, tmp_path, parts, options):
    options = {"max_steps": 9, "save_strategy": "steps", "logging_steps": 1, "parts": parts, **options}
    straight = train(tmp_path / "straight", **options)
    stopped = shutil.copytree(straight, tmp_path / "stopped")
    for path in _checkpoints(stopped)[1:] + [stopped / "final"]:
        shutil.rmtree(path)
    train(stopped, **options)

    _assert_same_weights(straight / "final", stopped / "final")
    last = _checkpoints(straight)[-1].name
    states = [torch.load(run / last / "optimizer.pt", weights_only=True) for run in (straight, stopped)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for one, other in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert _losses(straight) == _losses(stopped)


def test_a_mixture_goes_on_with_the_same_rows_from_any_step(train, rows, tmp_path, monkeypatch):
    """Weighted sources, epochs of 5 micro-batches: stopped at every step, the same rows follow in the same batches."""
    served: list[list[str]] = []
    collate = PaddingCollator.__call__

    def note(self, examples):
        served.append([f"{example.row.where} {example.position}" for example in examples])
        return collate(self, examples)

    monkeypatch.setattr(PaddingCollator, "__call__", note)
    sources = [{"path": str(rows), "weight": 3, "take": "random:50%"}, {"path": str(rows), "weight": 1}]
    options = {
        "data": {"sources": sources, "epoch_rows": 9}, "parts": {"image.connector": "full"}, "max_steps": 8,
        "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    straight = train(tmp_path / "straight", **options)
    whole = list(served)
    assert len(whole) == 8 and sorted(map(len, whole)) == [1] + [2] * 7
    for step in range(1, 8):
        stopped = shutil.copytree(straight, tmp_path / f"stopped-{step}")
        for path in _checkpoints(stopped)[step:] + [stopped / "final"]:
            shutil.rmtree(path)
        served.clear()
        train(stopped, **options)
        assert served == whole[step:]
        _assert_same_weights(straight / "final", stopped / "final")


def test_a_run_stopped_behind_its_last_step_only_writes_its_model(train, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "parts": LORA}
    straight = train(tmp_path / "straight", **options)
    stopped = shutil.copytree(straight, tmp_path / "stopped")
    shutil.rmtree(stopped / "final")
    train(stopped, **options)
    _assert_same_weights(straight / "final", stopped / "final")
    assert [path.name for path in _checkpoints(stopped)] == ["checkpoint-4"]


def _checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def _assert_same_weights(one: Path, other: Path) -> None:
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files and files == sorted(path.name for path in other.glob("*.safetensors"))
    for name in files:
        before, after = load_file(one / name), load_file(other / name)
        assert before.keys() == after.keys()
        assert [key for key in before if not torch.equal(before[key], after[key])] == []


def _losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["learning_rate"]) for line in lines if "loss" in line]
