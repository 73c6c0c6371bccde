"""A key changes with everything that decides features, and with nothing else."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import PIL.features
import pytest
import torch

from mllm.data.schema import MediaItem
from mllm.models.modeling import MllmTower
from mllm.processing import MllmProcessor
from mllm.testing import tiny_model
from mllm.training.feature_cache import ingredients
from mllm.training.feature_cache import key as key_module
from mllm.training.feature_cache.key import FeatureSpace, feature_space


@dataclass
class Made:
    """What a key is made of."""

    tower: MllmTower
    processor: MllmProcessor
    features: torch.Tensor
    autocast: torch.dtype | None = None
    content: bytes = b"1" * 32
    view: str = "0"
    item: MediaItem = MediaItem("image", Path("a.png"), 10, 10)

    @property
    def space(self) -> FeatureSpace:
        return feature_space(
            self.item.kind, self.tower, self.processor, features=self.features, autocast=self.autocast
        )

    @property
    def key(self) -> bytes:
        return self.space.key(self.content, self.item, self.view)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple:
    directory = tmp_path_factory.mktemp("model")
    model, processor = tiny_model(directory)
    return directory, model, processor


@pytest.fixture
def made(parts) -> Made:
    _, model, processor = copy.deepcopy(parts)
    tower = model.model.image_tower
    return Made(tower, processor, tower.encode(tower.native_zeros()).detach())


def _set(path: str, value: Any) -> Callable[[Made, pytest.MonkeyPatch], Any]:
    *owners, name = path.split(".")

    def change(made: Made, _: pytest.MonkeyPatch) -> None:
        owner: Any = made
        for step in owners:
            owner = getattr(owner, step)
        assert getattr(owner, name) != value
        setattr(owner, name, value)

    return change


def _one_weight(made: Made, _: pytest.MonkeyPatch) -> None:
    last = list(made.tower.encoder.parameters())[-1]
    with torch.no_grad():
        last.view(-1)[-1] += 1e-3


def _codec(made: Made, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PIL.features, "version", lambda name: "another")


CHANGES: dict[str, Callable[[Made, pytest.MonkeyPatch], Any]] = {
    "content": _set("content", b"2" * 32),
    "kind": _set("item", MediaItem("video", Path("a.png"), 10, 10)),
    "view": _set("view", "1"),
    "start": _set("item", MediaItem("image", Path("a.png"), 10, 10, start=1.0)),
    "end": _set("item", MediaItem("image", Path("a.png"), 10, 10, end=1.0)),
    "colours": _set("processor.image_processor.image_mean", [0.0, 0.0, 0.0]),
    "filter": _set("processor.image_processor.resample", 0),
    "padding": _set("processor.image_processor.do_pad", False),
    "size": _set("processor.image_processor.crop_size", {"height": 8, "width": 8}),
    "geometry": _set("processor.image_geometry", "crop"),
    "pillow": lambda made, patch: patch.setattr(PIL, "__version__", "0.1"),
    "codec": _codec,
    "transformers": lambda made, patch: patch.setattr(ingredients.transformers, "__version__", "0.1"),
    "our code": lambda made, patch: patch.setattr(ingredients, "code_digest", lambda kind: "another"),
    "weights": _one_weight,
    "encoder": _set("tower.config.encoder_config.layer_norm_eps", 1e-3),
    "layer": _set("tower.config.feature_layer", 1),
    "select": lambda made, _: made.tower.config.rule.update(feature_select="full"),
    "dtype": lambda made, _: setattr(made, "features", made.features.bfloat16()),
    "shape": lambda made, _: setattr(made, "features", made.features[:, 1:]),
    "device": lambda made, _: setattr(made, "features", made.features.to("meta")),
    "mixed precision": _set("autocast", torch.bfloat16),
    "format": lambda made, patch: patch.setattr(key_module, "FORMAT", 99),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_key_changes_with_every_ingredient(made, monkeypatch, change):
    before = made.key
    change(made, monkeypatch)
    assert made.key != before


def test_a_key_says_nothing_of_where_a_file_lies(made):
    before = made.key
    made.item = MediaItem("image", Path("elsewhere/b.png"), 10, 10)
    assert made.key == before


def test_a_model_saved_and_loaded_has_the_same_keys(made, parts):
    from mllm import load_model, load_processor

    directory, model, processor = parts
    for part in (model, processor):
        part.save_pretrained(directory / "saved")
    loaded = Made(
        load_model(directory / "saved").model.image_tower, load_processor(directory / "saved"), made.features
    )
    assert loaded.key == made.key
