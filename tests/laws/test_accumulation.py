"""Accumulate 8x1 == 1x8: the loss is the mean over all supervised tokens of the global batch, however it is cut."""

import json

import pytest
import torch

from mllm import load_model
from mllm.load import merged

PARTS = {
    "full": {"image.connector": "full", "text": "full"},
    "lora": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_accumulated_equals_whole(train, tmp_path, parts):
    """Eight rows at a time out of twelve, so that the second step of an epoch is a short one."""
    options = {"optim": "sgd", "parts": parts, "logging_steps": 1}
    whole = train(tmp_path / "whole", per_device_train_batch_size=8, **options)
    cut = train(tmp_path / "cut", per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    one, other = (merged(load_model(run / "final")).state_dict() for run in (whole, cut))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=name)
    losses = [[json.loads(line).get("loss", 0) for line in (run / "log.jsonl").open()] for run in (whole, cut)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
