"""Training on cached features == training that runs the encoder: losses at every step, and final weights.

The law's tolerance is float32's, 1e-5: the fill encodes in batches of its own, and a matrix product of another height
may round otherwise. Where the batches are the same ones, features are equal bit for bit.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from mllm import load_model
from mllm.assemble import assemble_checkpoint
from mllm.load import merged
from mllm.models.modeling import MllmTower
from mllm.testing import save_tiny_parts, save_tiny_rows
from mllm.training.feature_cache import cache

PARTS = {
    "linear": {"image.connector": "full"},
    "mlp": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}},
}
"""What is trained behind each connector."""

OPTIONS = {"optim": "sgd", "logging_steps": 1, "max_steps": 5}
"""Adam would make a whole step of the sign of a rounding error, where a gradient is next to nothing."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Rows of no, one and two images."""
    return save_tiny_rows(tmp_path_factory.mktemp("rows"), 9, num_images=lambda number: number % 3)


@pytest.mark.parametrize("connector", PARTS)
def test_cached_equals_uncached(train, mixed, tmp_path, monkeypatch, connector):
    model = assemble_checkpoint(tmp_path / "model", **save_tiny_parts(tmp_path), connector=connector)
    options = OPTIONS | {"model": str(model), "data": [str(mixed)], "parts": PARTS[connector]}
    train(tmp_path / "uncached", **options)
    calls = _count_calls(monkeypatch)
    train(tmp_path / "filling", **options, feature_cache=str(tmp_path / "features"))
    assert calls == [1, 9]  # an item to see the shape of features, and the nine images of the rows at once
    train(tmp_path / "filled", **options, feature_cache=str(tmp_path / "features"))
    assert calls == [1, 9, 1]
    for run in ("filling", "filled"):
        _assert_same_runs(tmp_path / "uncached", tmp_path / run)


def test_two_cached_ranks_equal_one_uncached_process(train, lopsided_rows, two_ranks, tmp_path):
    options = OPTIONS | {"data": [str(lopsided_rows)], "parts": PARTS["mlp"]}
    train(tmp_path / "one", **options | {"per_device_train_batch_size": 4})
    two_ranks(_train_cached, train, tmp_path, options)
    _assert_same_runs(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "features").rglob("*.index"))) == 2, "each rank fills its share"


@pytest.mark.slow
def test_sharded_cached_ranks_equal_one_uncached_process(train, lopsided_rows, two_ranks, tmp_path):
    options = OPTIONS | {"data": [str(lopsided_rows)], "parts": PARTS["mlp"]}
    train(tmp_path / "one", **options | {"per_device_train_batch_size": 4})
    two_ranks(_train_sharded, train, tmp_path, options)
    _assert_same_runs(tmp_path / "one", tmp_path / "two")
    train(tmp_path / "alone", **options, feature_cache=str(tmp_path / "features"))
    assert len(list((tmp_path / "features").glob("*/space.json"))) == 1, "weights have one hash, sharded or whole"


def _train_sharded(train, root: Path, options: dict) -> None:
    """In each rank, with the encoder's weights dealt out among them while it fills the cache."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
    del os.environ["ACCELERATE_USE_CPU"]
    is_sharded, seen = cache._is_sharded, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_is_sharded", lambda module: seen.append(is_sharded(module)) or seen[-1])
        _train_cached(train, root, options)
    assert seen and all(seen)


def _train_cached(train, root: Path, options: dict) -> None:
    """In each rank, where the encoder is asked for its share of the media and never again."""
    with pytest.MonkeyPatch.context() as patch:
        calls = _count_calls(patch)
        train(root / "two", **options, feature_cache=str(root / "features"))
        assert len(calls) == 2


def _assert_same_runs(one: Path, other: Path) -> None:
    assert len(_losses(one)) >= 5
    torch.testing.assert_close(_losses(other), _losses(one), rtol=0, atol=1e-5)
    expected, found = (merged(load_model(run / "final")).state_dict() for run in (one, other))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=name)


def _losses(run: Path) -> torch.Tensor:
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


def _count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of an encoder reads."""
    calls: list[int] = []
    encode = MllmTower.encode

    def counting(self: MllmTower, pixel_values: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(MllmTower, "encode", counting)
    return calls
