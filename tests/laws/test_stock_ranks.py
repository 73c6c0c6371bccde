"""Two ranks == one process for stock models, also where a rank has no media, or no row at all, in its micro-batch.

Both ranks really run, over gloo, under DistributedDataParallel; it stops a rank whose connector has no gradient.
"""

from pathlib import Path

import pytest
import torch

from mllm import load_model
from mllm.data.batch_plan import rank_batches
from mllm.data.order import every_row_once
from mllm.load import merged
from mllm.testing import save_tiny_rows
from mllm.testing_checkpoints import save_stock_checkpoint

FAMILIES = [
    "llava",
    pytest.param("qwen2_5_vl", marks=pytest.mark.slow),
    pytest.param("gemma3", marks=pytest.mark.slow),
]
NUM_ROWS = 9  # in micro-batches of 2 on 2 ranks: two whole steps, then one row for one rank and none for the other
SEED = 42


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Rows of which those of the second rank are text alone in the first epoch, and some in the second."""
    second = list(rank_batches(every_row_once(NUM_ROWS)(0, SEED), batch_size=2, rank=1, world_size=2))
    assert second[-1] == []
    text_only = {row for batch in second for row in batch}
    directory = tmp_path_factory.mktemp("rows")
    return save_tiny_rows(directory, NUM_ROWS, num_images=lambda number: 0 if number in text_only else 1 + number % 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_equal_one_process(family, train, two_ranks, mixed, tmp_path):
    options = {
        "model": str(save_stock_checkpoint(tmp_path / "model", family)),
        "data": [str(mixed)],
        "eval_data": [str(mixed)],
        "eval_strategy": "epoch",
        "parts": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}},
        "optim": "sgd",
        "max_steps": 5,
    }
    train(tmp_path / "one", per_device_train_batch_size=4, **options)
    two_ranks(_train, train, tmp_path / "two", options)
    one, two = (merged(load_model(tmp_path / run / "final")).state_dict() for run in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5, msg=name)


def _train(train, output_dir: Path, options: dict) -> None:
    train(output_dir, per_device_train_batch_size=2, **options)
