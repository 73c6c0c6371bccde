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
from mllm.testing import save_tiny_parts, save_tiny_rows, tiny_tokenizer
from mllm.testing_media import save_tiny_media_rows
from mllm.training import batching as training_batching
from mllm.training.feature_cache import encoding

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
    model = assemble_checkpoint(tmp_path / "model", **save_tiny_parts(tmp_path, image={"connector": connector}))
    options = OPTIONS | {"model": str(model), "data": [str(mixed)], "parts": PARTS[connector]}
    train(tmp_path / "uncached", **options)
    calls = _count_calls(monkeypatch)
    train(tmp_path / "filling", **options, feature_cache=str(tmp_path / "features"))
    assert calls == [1, 9]  # an item to see the shape of features, and the nine images of the rows at once
    train(tmp_path / "filled", **options, feature_cache=str(tmp_path / "features"))
    assert calls == [1, 9, 1]
    for run in ("filling", "filled"):
        _assert_same_runs(tmp_path / "uncached", tmp_path / run)


ALL_KINDS = {
    "image": {"tiles": "sphinx"},
    "audio": {"connector": {"type": "pool", "norm": True}},
    "video": {"connector": {"type": "perceiver", "num_latents": 3, "depth": 1, "per": "item"}, "frames": "fps:2:2:8"},
}
QFORMER = {"layers": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 10, "num_queries": 3, "dropout": 0.0}
TRAINED = {"image.connector": "full", "audio.connector": "full", "video.connector": "full"}


@pytest.fixture(scope="module")
def of_all_kinds(tmp_path_factory) -> dict:
    """A model that reads sounds, videos and, with the question, tiles; and rows of them."""
    root = tmp_path_factory.mktemp("all_kinds")
    tiny_tokenizer("gpt_neox").save_pretrained(root / "words")
    asking = {"type": "instruct_qformer", **QFORMER, "tokenizer": str(root / "words")}
    towers = {**ALL_KINDS, "image": {**ALL_KINDS["image"], "connector": asking}}
    model = assemble_checkpoint(root / "model", **save_tiny_parts(root, **towers))
    rows = save_tiny_media_rows(root / "rows", ("itav", "", "vv", "a", "iai", "avi", "tt", "av"))
    return OPTIONS | {"model": str(model), "data": [str(rows)], "parts": TRAINED}


BATCHING = {
    "length": {"batching": "length"},
    "packed": {"batching": "packed", "pack_length": 200, "per_device_train_batch_size": 1},
}


@pytest.mark.parametrize("batching", [pytest.param("length", marks=pytest.mark.slow), "packed"])
def test_cached_equals_uncached_for_tiles_sounds_and_videos(train, of_all_kinds, tmp_path, monkeypatch, batching):
    # What is packed together depends on what the encoders spend, which a cache spares.
    monkeypatch.setattr(training_batching, "encoder_share", lambda args, model: 0.0)
    options = of_all_kinds | BATCHING[batching]
    train(tmp_path / "uncached", **options)
    calls = _count_calls(monkeypatch)
    train(tmp_path / "filled", **options, feature_cache=str(tmp_path / "features"))
    samples = calls[:3]
    assert samples == [1, 1, 1] and len(calls) == 6, "a view of each kind to see its shape, and all of them once"
    _assert_same_runs(tmp_path / "uncached", tmp_path / "filled")


@pytest.mark.slow
def test_two_cached_ranks_equal_one_for_tiles_sounds_and_videos(train, of_all_kinds, two_ranks, tmp_path):
    train(tmp_path / "one", **of_all_kinds | {"per_device_train_batch_size": 4})
    two_ranks(_train_two, train, tmp_path, of_all_kinds)
    _assert_same_runs(tmp_path / "one", tmp_path / "two")


def _train_two(train, root: Path, options: dict) -> None:
    train(root / "two", **options, feature_cache=str(root / "features"))


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
    is_sharded, seen = encoding.is_sharded, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "is_sharded", lambda module: seen.append(is_sharded(module)) or seen[-1])
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
    """How many views each call of an encoder reads."""
    calls: list[int] = []
    encode = MllmTower.encode

    def counting(self: MllmTower, values: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(len(values))
        return encode(self, values, sizes)

    monkeypatch.setattr(MllmTower, "encode", counting)
    return calls
