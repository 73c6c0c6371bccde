"""Accumulate 8x1 == 1x8: the loss is the mean over all supervised tokens of the global batch, however it is cut.

Also for transformers' own classes, of which many hide the count of tokens from a trainer (`accepts_loss_kwargs`).
"""

import json

import pytest
import torch

from mllm import load_model
from mllm.load import merged
from mllm.testing_checkpoints import save_stock_checkpoint

PARTS = {
    "full": {"image.connector": "full", "text": "full"},
    "lora": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}},
}
STOCK = [("llava", "full"), ("qwen2_5_vl", "full"), pytest.param("llava_next", "lora", marks=pytest.mark.slow)]


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_accumulated_equals_whole(train, tmp_path, parts):
    _assert_accumulated_equals_whole(train, tmp_path, parts=parts)


@pytest.mark.parametrize(("family", "parts"), STOCK)
def test_accumulated_equals_whole_for_stock_models(train, tmp_path, family, parts):
    checkpoint = save_stock_checkpoint(tmp_path / "checkpoint", family)
    _assert_accumulated_equals_whole(train, tmp_path, model=str(checkpoint), parts=PARTS[parts])


def _assert_accumulated_equals_whole(train, tmp_path, **options) -> None:
    """Eight rows at a time out of twelve, so that the second step of an epoch is a short one."""
    options |= {"optim": "sgd", "logging_steps": 1}
    whole = train(tmp_path / "whole", per_device_train_batch_size=8, **options)
    cut = train(tmp_path / "cut", per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    one, other = (merged(load_model(run / "final")).state_dict() for run in (whole, cut))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=name)
    lines = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in (whole, cut)]
    for name in ("loss", "grad_norm", "supervised_tokens"):
        figures = [[line[name] for line in run if name in line] for run in lines]
        assert len(figures[0]) == 4 and figures[0] == pytest.approx(figures[1], abs=1e-5)
