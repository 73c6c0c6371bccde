"""How the vectors of media came to be: which patches of which views are behind each, by family of models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mllm.models.encoders import ENCODERS
from mllm.models.media import Media, media_layout
from mllm.models.modeling import MllmTower
from mllm.pruning.anatomy import Anatomy
from mllm.shapes import EncoderFeatures, Int, MediaVectors, Tensor
from mllm.sizes import EACH


@dataclass(frozen=True)
class SeenItem:
    """Where one item stands among the views of an encoding.

    Args:
        views: Its views.
        patches: Which of its patches each of its vectors stands for, see `Evidence.patches`; None where that cannot
            be told, since its connector mixes them.
        grid: See `Item.grid`.
    """

    views: slice
    patches: Int[Tensor, "V p"] | None
    grid: tuple[int, int, int] | None


@dataclass(frozen=True)
class Encoding:
    """The media of one modality that went through encoder and connector together.

    Args:
        num_views: Of all items.
        num_prefix_tokens: Of the encoder's tokens, those in front of the patches.
        items: One by one.
        features: What the connector read [views, patches, D_encoder], where it turns each patch into a vector by
            itself; else None.
        connect: That connector, for features of any patches [n, D_encoder].
    """

    num_views: int
    num_prefix_tokens: int
    items: list[SeenItem]
    features: EncoderFeatures | None = None
    connect: Callable[[Tensor], Tensor] | None = None


POINTWISE = ("linear", "mlp")
"""Connectors of ours that turn each feature into a vector by itself."""


def composed_encoding(
    anatomy: Anatomy, media: Media, features: EncoderFeatures, vectors: list[MediaVectors]
) -> Encoding:
    """Of media of a model of ours."""
    tower: MllmTower = anatomy.backbone.towers[media.modality]
    rule, num_views = tower.rule, len(features)
    counts = (
        [1] * num_views
        if media.sizes is None
        else list(map(len, media_layout(rule, media.sizes, num_views=num_views).views))
    )
    is_each = rule.connector == EACH and rule.tiles is None and not tower.config.through_image_connector
    is_pointwise = is_each and tower.config.connector["type"] in POINTWISE and not tower.config.connector["positions"]
    items, first = [], 0
    for count, vector in zip(counts, vectors, strict=True):
        patches = torch.arange(len(vector), device=features.device)[:, None] if is_each else None
        items.append(SeenItem(slice(first, first + count), patches, _square(count, len(vector)) if is_each else None))
        first += count
    return Encoding(
        num_views,
        rule.num_prefix_tokens,
        items,
        features if is_pointwise else None,
        (lambda one: tower.connect(one[None])[0]) if is_pointwise else None,
    )


def stock_encoding(
    anatomy: Anatomy, vectors: list[MediaVectors], features: Tensor | None, inputs: Mapping[str, Any]
) -> Encoding:
    """Of pictures of a stock model."""
    vision = anatomy.model.config.vision_config
    projector = anatomy.backbone.multi_modal_projector
    items = [
        SeenItem(
            slice(one, one + 1), torch.arange(len(vector), device=vector.device)[:, None], _square(1, len(vector))
        )
        for one, vector in enumerate(vectors)
    ]
    prefix = ENCODERS[vision.model_type].num_prefix_tokens(vision)
    return Encoding(len(vectors), prefix, items, features, lambda one: projector(one[None])[0])


def _square(num_views: int, num_vectors: int) -> tuple[int, int, int] | None:
    """Views, rows and columns of vectors that stand in squares."""
    side = round((num_vectors / num_views) ** 0.5)
    return (num_views, side, side) if num_views * side * side == num_vectors else None
