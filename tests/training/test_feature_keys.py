"""A key changes with everything that decides features, and with nothing else."""

import copy
import dataclasses
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
from mllm.sizes import LengthRule
from mllm.testing import tiny_model
from mllm.testing_images import save_sphinx_encoders
from mllm.training.feature_cache import ingredients
from mllm.training.feature_cache import key as key_module
from mllm.training.feature_cache.key import FeatureSpace, feature_space, view_names


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
    audio_tower: MllmTower | None = None

    @property
    def space(self) -> FeatureSpace:
        return feature_space(
            self.item.kind, self.tower, self.processor, features=self.features, autocast=self.autocast
        )

    @property
    def key(self) -> bytes:
        return self.space.key(self.content, self.item, self.view)


TOWERS = {"image": {"tiles": {"type": "llava_next", "max_tiles": 4}}, "audio": {}, "video": {"frames": "fps:2:2:8"}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple:
    directory = tmp_path_factory.mktemp("model")
    model, processor = tiny_model(directory, **TOWERS)
    return directory, model, processor


@pytest.fixture
def made(parts) -> Made:
    _, model, processor = copy.deepcopy(parts)
    tower = model.model.image_tower
    return Made(tower, processor, tower.encode(tower.native_zeros()).detach(), audio_tower=model.model.audio_tower)


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
    "padding": _set("processor.image_processor.do_pad", True),
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


SOUND = MediaItem("audio", Path("a.wav"), seconds=1.0)
VIDEO = MediaItem("video", Path("a.mp4"), 10, 10, frames=10, seconds=2.0)


def _rule(kind: str, **fields: Any) -> Callable[[Made, pytest.MonkeyPatch], Any]:
    """Give the processor another rule."""

    def change(made: Made, _: pytest.MonkeyPatch) -> None:
        rule = made.processor._rules[kind]
        assert all(getattr(rule, name) != value for name, value in fields.items())
        made.processor._rules[kind] = dataclasses.replace(rule, **fields)

    return change


def _torchcodec(made: Made, patch: pytest.MonkeyPatch) -> None:
    """It is there, in some version."""
    patch.setattr(ingredients, "video_decoder_class", lambda: object)
    _version("torchcodec")(made, patch)


def _version(package: str) -> Callable[[Made, pytest.MonkeyPatch], Any]:
    def change(_: Made, patch: pytest.MonkeyPatch) -> None:
        version = ingredients._version
        patch.setattr(ingredients, "_version", lambda name: "another" if name == package else version(name))

    return change


OF_KINDS: dict[str, tuple[MediaItem, Callable[[Made, pytest.MonkeyPatch], Any]]] = {
    "tiles": (MediaItem("image", Path("a.png"), 10, 10), _rule("image", tiles=None)),
    "spectrogram": (SOUND, _set("processor.feature_extractor.feature_size", 99)),
    "sampling rate": (SOUND, _rule("audio", sampling_rate=8000)),
    "window": (SOUND, _rule("audio", window=100)),
    "clips": (SOUND, _rule("audio", clips=3)),
    "soundfile": (SOUND, _version("soundfile")),
    "resampler": (SOUND, _version("soxr")),
    "weights of the audio encoder": (SOUND, _one_weight),
    "our code for sounds": (SOUND, lambda made, patch: patch.setattr(ingredients, "code_digest", lambda kind: "")),
    "colours": (VIDEO, _set("processor.image_processor.image_mean", [0.0, 0.0, 0.0])),
    "geometry": (VIDEO, _set("processor.image_geometry", "crop")),
    "decoder": (VIDEO, _version("av")),
    "another decoder": (VIDEO, _torchcodec),
    "weights of the image encoder": (VIDEO, _one_weight),
}


@pytest.mark.parametrize(("item", "change"), OF_KINDS.values(), ids=OF_KINDS.keys())
def test_a_key_of_another_kind_changes_with_its_ingredients(made, monkeypatch, item, change):
    made.item = item
    if item.kind == "audio":
        made.tower = made.audio_tower
        made.features = made.tower.encode(made.tower.native_zeros()).detach()
    before = made.key
    change(made, monkeypatch)
    assert made.key != before


def test_a_key_says_nothing_of_what_becomes_of_features(made, monkeypatch):
    """The same features serve every connector."""
    for kind, item in (("audio", SOUND), ("video", VIDEO), ("image", MediaItem("image", Path("a.png"), 10, 10))):
        made.item = item
        before = made.key
        _rule(kind, connector=LengthRule("fixed", tokens=3), is_joined=True)(made, monkeypatch)
        assert made.key == before
    made.item = SOUND
    before = made.key
    _rule("audio", most_windows=3)(made, monkeypatch)
    assert made.key == before


def test_views_are_told_apart_by_what_they_show(made):
    """Windows by their number and the length of the sound, frames by their moment, tiles by their number."""
    processor = made.processor
    window = processor.rule("audio").window_seconds
    sound = dataclasses.replace(SOUND, seconds=2.5 * window)
    names = view_names(sound, processor)
    assert len(set(names)) == 3
    assert not set(names) & set(view_names(dataclasses.replace(SOUND, seconds=2.4 * window), processor))
    assert view_names(VIDEO, processor) == [repr(moment) for moment in processor.frame_times(VIDEO.size)]
    cut = dataclasses.replace(VIDEO, start=1.0)
    assert view_names(cut, processor)[0] == repr(1.0 + processor.frame_times(cut.size)[0])
    tiled = MediaItem("image", Path("a.png"), 10, 40)
    assert view_names(tiled, processor) == [
        str(number) for number in range(len(processor.rule("image").views((10, 40))))
    ]


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


def test_several_encoders_have_one_space_that_knows_the_weights_of_each(tmp_path):
    from mllm import load_model, load_processor

    encoders = save_sphinx_encoders(tmp_path / "encoders")
    image = {"encoder": encoders, "join": "sequence", "connector": "streams"}
    model, processor = tiny_model(tmp_path / "parts", image=image)
    tower = model.model.image_tower
    made = Made(tower, processor, tower.encode(tower.native_zeros()).detach())
    before = made.key
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved").model.image_tower
    assert Made(loaded, load_processor(tmp_path / "saved"), made.features).key == before
    digests = {before}
    for encoder in tower.encoder.children():
        with torch.no_grad():
            next(iter(encoder.parameters())).add_(1e-3)
        digests.add(made.key)
    assert len(digests) == 1 + len(list(tower.encoder.children())) >= 5
