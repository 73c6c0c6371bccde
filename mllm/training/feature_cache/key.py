"""The key of a view's features: everything that decides them, and nothing that does not.

Features of equal keys are equal, up to the rounding that comes with the size of a batch and the kind of the device.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from mllm.data.indexing.content_keys import hash_of
from mllm.data.schema import MediaItem
from mllm.models.modeling import MllmTower
from mllm.processing import MllmProcessor
from mllm.training.feature_cache.ingredients import input_ingredients, plain

FORMAT = 2
"""Of the files, and of what is done to a medium besides decoding it; a higher number makes all older features void."""


@dataclass(frozen=True)
class FeatureSpace:
    """What all features of one kind of media have in common in a run: inputs, encoder, layer, types.

    Args:
        ingredients: Everything that decides them, as JSON can hold it.
        num_tokens: Vectors of a view.
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
    def view_bytes(self) -> int:
        """Bytes of one view's features."""
        return self.num_tokens * self.width * self.dtype.itemsize

    def key(self, content: bytes, item: MediaItem, view: str) -> bytes:
        """The key of a view's features.

        Args:
            content: SHA-256 of the bytes that a decoder gets.
            item: Which part of them is read.
            view: Which view of that, see `view_names`.
        """
        told = f"{self.digest} {content.hex()} {item.kind} {item.start} {item.end} {view}"
        return hashlib.sha256(told.encode()).digest()


def feature_space(
    kind: str,
    tower: MllmTower,
    processor: MllmProcessor,
    *,
    features: torch.Tensor,
    autocast: torch.dtype | None = None,
) -> FeatureSpace:
    """The space of what an encoder gives for one kind of media.

    Args:
        kind: "image", "audio" or "video".
        tower: The one whose encoder sees them; its weights are hashed.
        processor: Makes the encoder's inputs.
        features: Of any one view, [1, L, D_encoder].
        autocast: The type of mixed precision that the encoder runs in, if it does.
    """
    assert tower.encoder is not None
    ingredients = {
        "format": FORMAT,
        "inputs": input_ingredients(kind, processor),
        "encoder": {"config": plain(tower.encoder.config.to_dict()), "weights": hash_weights(tower.encoder)},
        "feature_layer": tower.config.feature_layer,
        "num_dropped": tower.config.media_rule.num_dropped,
        "dtype": {"autocast": str(autocast), "features": str(features.dtype)},
        "device": features.device.type,
        "shape": list(features.shape[1:]),
    }
    return FeatureSpace(ingredients, features.shape[1], features.shape[2], features.dtype)


def view_names(item: MediaItem, processor: MllmProcessor) -> list[str]:
    """What tells each view of an item from every other of the same file and the same cut.

    Of a video that is the moment when a frame is shown: whoever sees it among other frames finds it again.

    Raises:
        RowError: It is too large for the model, or has nothing in it.
    """
    if item.kind == "video":
        return [repr((item.start or 0.0) + moment) for moment in processor.frame_times(item.size)]
    rule = processor.rule(item.kind)
    count = len(rule.views(item.size))
    if item.kind == "audio":  # is cut, or filled up, to the length that its row states
        return [f"{number} of {rule.num_samples(item.size[0])} samples" for number in range(count)]
    return [str(number) for number in range(count)]


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
