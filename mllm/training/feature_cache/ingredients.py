"""What decides an encoder's inputs, given a file's bytes: settings, our code, and the libraries that decode."""

from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL
import PIL.features
import transformers

import mllm.processing.audio
import mllm.processing.geometry
import mllm.processing.images
import mllm.processing.sounds
import mllm.processing.tiles
import mllm.processing.torchcodec_frames
import mllm.processing.video
import mllm.processing.videos
import mllm.sizes.audio
import mllm.sizes.sampling
import mllm.sizes.tiles
from mllm.data.indexing.content_keys import hash_of
from mllm.processing import MllmProcessor
from mllm.processing.torchcodec_frames import video_decoder_class
from mllm.sizes import written_rule

CODECS = ("libjpeg_turbo", "libtiff", "webp", "zlib")
"""Decoders inside Pillow. They differ between builds of one Pillow, in the last bit of a pixel."""

NAMES_ONLY = ("_name_or_path", "transformers_version", "architectures")
"""Fields of a configuration that say where it comes from."""

BEHIND = ("connector", "is_joined", "most_windows")
"""Fields of a rule that concern what becomes of features."""

_PIXELS = (mllm.processing.images, mllm.processing.geometry)
_CODE: dict[str, tuple[ModuleType, ...]] = {
    "image": (*_PIXELS, mllm.processing.tiles, mllm.sizes.tiles),
    "audio": (mllm.processing.audio, mllm.processing.sounds, mllm.sizes.audio),
    "video": (
        *_PIXELS,
        mllm.processing.video,
        mllm.processing.videos,
        mllm.processing.torchcodec_frames,
        mllm.sizes.sampling,
    ),
}
_DECODERS: dict[str, tuple[str, ...]] = {"image": (), "audio": ("av", "soundfile", "soxr"), "video": ("av",)}
"""Packages beside Pillow."""


def input_ingredients(kind: str, processor: MllmProcessor) -> dict[str, Any]:
    """Everything that decides what an encoder sees of a file of this kind."""
    versions = {name: _version(name) for name in _DECODERS[kind]}
    common = {"code": code_digest(kind), "versions": {"transformers": transformers.__version__, **versions}}
    if kind == "audio":
        rule = {name: value for name, value in written_rule(processor.rule("audio")).items() if name not in BEHIND}
        return {**common, "extractor": plain(processor.feature_extractor.to_dict()), "rule": rule}
    pixels = {
        **common,
        "image_processor": plain(processor.image_processor.to_dict()),
        "geometry": processor.image_geometry,
        "pillow": PIL.__version__,
        "codecs": {name: PIL.features.version(name) for name in CODECS},
    }
    if kind == "video":
        decoder = video_decoder_class()
        return {**pixels, "torchcodec": None if decoder is None else _version("torchcodec")}
    return {**pixels, "tiles": written_rule(processor.rule("image"))["tiles"]}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the fields that only say where it comes from."""
    return {name: value for name, value in fields.items() if name not in NAMES_ONLY}


@cache
def code_digest(kind: str) -> str:
    """Of our code between a file and an encoder's inputs: whoever mends it must not be served what it made before."""
    return hash_of([Path(str(module.__file__)).read_text(encoding="utf-8") for module in _CODE[kind]])
