"""Two ranks == one process for stock models, also where a rank has no media, or no row at all, in its micro-batch.

Both ranks really run, over gloo, under DistributedDataParallel; it stops a rank whose connector has no gradient.
"""

from pathlib import Path

import pytest
import torch

from mllm import load_model
from mllm.load import merged
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_stock import STOCK_FAMILIES

# SmolVLM is Idefics 3 with a processor that asks for one more package; tests/models/test_joining.py has all families.
FAMILIES = [
    pytest.param(family, marks=() if family == "llava" else pytest.mark.slow)
    for family in STOCK_FAMILIES
    if family not in ("smolvlm", "qwen2_audio")
]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_equal_one_process(family, train, two_ranks, lopsided_rows, tmp_path):
    options = {
        "model": str(save_stock_checkpoint(tmp_path / "model", family)),
        "data": [str(lopsided_rows)],
        "eval_data": [str(lopsided_rows)],
        "eval_strategy": "epoch",
        "parts": {"image.encoder": "full", "image.connector": "full", "text": {"mode": "lora", "rank": 4}},
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
