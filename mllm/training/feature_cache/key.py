"""The key of a medium's features: everything that decides them, and nothing that does not.

Features of equal keys are equal, up to the rounding that comes with the size of a batch and the kind of the device.
"""

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import PIL
import PIL.features
import torch
import transformers
from torch import nn

import mllm.processing.geometry
import mllm.processing.images
from mllm.data.indexing.content_keys import hash_of
from mllm.data.schema import MediaItem
from mllm.models.configuration import MllmTowerConfig
from mllm.processing import MllmProcessor

FORMAT = 1
"""Of the files, and of what is done to a medium besides decoding it; a higher number makes all older features void."""

CODECS = ("libjpeg_turbo", "libtiff", "webp", "zlib")
"""Decoders inside Pillow. They differ between builds of one Pillow, in the last bit of a pixel."""

GEOMETRY = ("image_size", "patch_size", "num_prefix_tokens", "feature_select", "image_geometry")
NAMES_ONLY = ("_name_or_path", "transformers_version", "architectures")
"""Fields of a configuration that say where it comes from."""


@dataclass(frozen=True)
class FeatureSpace:
    """What all features of a run have in common: pixels, encoder, layer, types.

    Args:
        ingredients: Everything that decides them, as JSON can hold it.
        num_tokens: Vectors of a media item.
        width: Of a vector.
        dtype: Of its numbers.
    """

    ingredients: dict[str, Any]
    num_tokens: int
    width: int
    dtype: torch.dtype

    @cached_property
    def digest(self) -> str:
        """A hash of all ingredients."""
        return hash_of(self.ingredients)

    @property
    def name(self) -> str:
        """The name of this space's directory in a cache."""
        return self.digest[:32]

    @property
    def item_bytes(self) -> int:
        """Bytes of one item's features."""
        return self.num_tokens * self.width * self.dtype.itemsize

    def key(self, content: bytes, item: MediaItem) -> bytes:
        """The key of a medium's features.

        Args:
            content: SHA-256 of the bytes that a decoder gets.
            item: Which part of them is read.
        """
        told = f"{self.digest} {content.hex()} {item.kind} {item.start} {item.end}"
        return hashlib.sha256(told.encode()).digest()


def image_space(
    encoder: nn.Module,
    config: MllmTowerConfig,
    processor: MllmProcessor,
    *,
    features: torch.Tensor,
    autocast: torch.dtype | None = None,
) -> FeatureSpace:
    """The space of an image tower's features.

    Args:
        encoder: Its weights are hashed.
        config: Of its tower.
        processor: Decides the pixels.
        features: Of any one image, [1, P, D_encoder].
        autocast: The type of mixed precision that the encoder runs in, if it does.
    """
    ingredients = {
        "format": FORMAT,
        "pixels": pixel_ingredients(processor),
        "encoder": {"config": plain(config.encoder_config.to_dict()), "weights": hash_weights(encoder)},
        "feature_layer": config.feature_layer,
        "feature_select": config.feature_select,
        "dtype": {"autocast": str(autocast), "features": str(features.dtype)},
        "device": features.device.type,
        "shape": list(features.shape[1:]),
    }
    return FeatureSpace(ingredients, features.shape[1], features.shape[2], features.dtype)


def pixel_ingredients(processor: MllmProcessor) -> dict[str, Any]:
    """What decides the pixels that an encoder sees, given a file's bytes."""
    return {
        "image_processor": plain(processor.image_processor.to_dict()),
        "geometry": {name: getattr(processor, name) for name in GEOMETRY},
        "versions": {"pillow": PIL.__version__, "transformers": transformers.__version__},
        "codecs": {name: PIL.features.version(name) for name in CODECS},
        "code": code_digest(),
    }


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the fields that only say where it comes from."""
    return {name: value for name, value in fields.items() if name not in NAMES_ONLY}


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """Of our code between a file and its pixels: whoever mends it must not be served what it made before."""
    modules = (mllm.processing.images, mllm.processing.geometry)
    return hash_of([Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules])
