"""Two ranks == one process, also where one of them has no media, or no row at all, in its micro-batch.

Both ranks really run, over gloo. Unequal calls of the encoder, or a parameter that waits for a gradient, would hang or
stop them.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from mllm import load_model
from mllm.data.batch_plan import rank_batches
from mllm.data.order import every_row_once
from mllm.load import merged
from mllm.testing import save_tiny_rows
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_stock import STOCK_FAMILIES

NUM_ROWS = (
    9  # in micro-batches of 2 on 2 ranks: two whole steps, then one row for the first rank and none for the other
)
SEED = 42

RUNS = {
    "connector": {"parts": {"image.connector": "full"}},
    "lora and connector": {"parts": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}},
    "encoder beside lora, accumulated": {
        "parts": {"image.encoder": "full", "text": {"mode": "lora", "rank": 4}},
        "gradient_accumulation_steps": 2,
    },
}

# SmolVLM is Idefics 3 with a processor that asks for one more package; tests/models/test_joining.py has all families.
FAMILIES = tuple(name for name in STOCK_FAMILIES if name not in ("smolvlm", "qwen2_audio"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Rows of which those of the second rank are text alone in the first epoch, and some in the second."""
    second = list(rank_batches(every_row_once(NUM_ROWS)(0, SEED), batch_size=2, rank=1, world_size=2))
    assert second[-1] == []
    text_only = {row for batch in second for row in batch}
    directory = tmp_path_factory.mktemp("rows")
    return save_tiny_rows(directory, NUM_ROWS, num_images=lambda number: 0 if number in text_only else 1 + number % 2)


def test_two_ranks_equal_one_process(train, mixed, two_ranks, tmp_path):
    for name, options in RUNS.items():
        accumulation = options.get("gradient_accumulation_steps", 1)
        train(
            tmp_path / name / "one", data=[str(mixed)], optim="sgd", save_strategy="steps", save_steps=2, max_steps=5,
            **options | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation},
        )  # fmt: skip
    two_ranks(_train_all, train, mixed, tmp_path)
    for name in RUNS:
        one, two = (merged(load_model(tmp_path / name / run / "final")).state_dict() for run in ("one", "two"))
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")


@pytest.mark.slow
def test_two_stock_ranks_equal_one_process(train, mixed, two_ranks, tmp_path):
    """Of every family, with its encoder trained; one of them stands in test_stock_ranks.py for every day."""
    for family in FAMILIES:
        save_stock_checkpoint(tmp_path / family / "checkpoint", family)
        _train_stock(train, mixed, tmp_path / family, "one", per_device_train_batch_size=4)
    two_ranks(_train_stock_in_rank, train, mixed, tmp_path, timeout=600)
    for family in FAMILIES:
        one, two = (merged(load_model(tmp_path / family / run / "final")).state_dict() for run in ("one", "two"))
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5, msg=f"{family}: {key}")


def _train_stock_in_rank(train, rows: Path, root: Path) -> None:
    for family in FAMILIES:
        _train_stock(train, rows, root / family, "two")


def _train_stock(train, rows: Path, root: Path, name: str, **options) -> None:
    parts = {"image.encoder": "full", "image.connector": "full", "text": {"mode": "lora", "rank": 4}}
    settled = {"data": [str(rows)], "parts": parts, "optim": "sgd", "max_steps": 5}
    train(root / name, model=str(root / "checkpoint"), **settled, **options)


def _train_all(train, rows: Path, root: Path) -> None:
    """In each rank. The last run is stopped and goes on."""
    options: dict = {"data": [str(rows)], "optim": "sgd", "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    for name, own in RUNS.items():
        train(root / name / "two", **options, **own)
    if os.environ["RANK"] == "0":
        shutil.rmtree(root / name / "two" / "final")
        shutil.rmtree(root / name / "two" / "checkpoint-4")
        shutil.rmtree(root / name / "two" / "checkpoint-5")
    torch.distributed.barrier()
    train(root / name / "two", **options, **own)
