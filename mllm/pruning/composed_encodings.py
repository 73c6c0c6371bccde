"""How the vectors of a composed model's media came to be."""

import torch
from torch.func import functional_call

from mllm.models.media import Media, media_layout
from mllm.models.mixed_configuration import MixedEncoderConfig
from mllm.models.modeling import MllmModel, MllmTower
from mllm.pruning.encodings import MIXING, Encoding, SeenItem, square_grid
from mllm.pruning.patches import Patches, at_places, connected_patches, feature_patches, in_view
from mllm.shapes import EncoderFeatures, MediaVectors, Tensor
from mllm.sizes import ImageTokenRule, MediaRule

POINTWISE = ("linear", "mlp")
"""Connectors that turn each feature into a vector by itself."""


def unread_encoder(backbone: MllmModel) -> str | None:
    """Why the image encoder of a model, which frames pass, too, tells nothing of its patches; None where it does."""
    is_joined = isinstance(backbone.towers["image"].config.encoder_config, MixedEncoderConfig)
    return "its features are those of several encoders, or of queries" if is_joined else None


def composed_encoding(
    backbone: MllmModel, media: Media, features: EncoderFeatures, vectors: list[MediaVectors]
) -> Encoding:
    """Of the media of one modality.

    Args:
        backbone: Of the model.
        media: Of a batch.
        features: Of their views.
        vectors: Of each item.
    """
    tower: MllmTower = backbone.towers[media.modality]
    eyes = backbone.towers["image"].rule  # frames pass the image tower's encoder
    assert isinstance(eyes, ImageTokenRule)
    unread = unread_encoder(backbone)
    num_views, num_features = features.shape[:2]
    layout = None if media.sizes is None else media_layout(tower.rule, media.sizes, num_views=num_views)
    counts = [1] * num_views if layout is None else list(map(len, layout.views))
    sizes = [None] * num_views if layout is None else layout.sizes
    num_leading = eyes.num_prefix_tokens - eyes.num_dropped
    of_view = None
    if unread is None:
        of_view = feature_patches(num_features, num_leading)
        if tower.config.through_image_connector:
            of_view = connected_patches(of_view, eyes.connector)
    items, first = [], 0
    for count, size, own in zip(counts, sizes, vectors, strict=True):
        patches = None if of_view is None else _item_patches(of_view, count, size, tower, num_patches=eyes.grid**2)
        views = slice(first, first + count)
        grid = _grid(count, len(own), tower.rule) if unread is None and num_leading == 0 else None
        items.append(SeenItem(views, patches, grid, *_tiles(count, size, tower.rule)))
        first += count
    if unread is None and any(item.patches is None for item in items):
        unread = MIXING
    is_pointwise = unread is None and _is_pointwise(tower)
    return Encoding(
        num_views,
        eyes.num_prefix_tokens,
        items,
        features[:, num_leading:] if is_pointwise else None,
        (lambda one: tower.connect(one[None])[0]) if is_pointwise else None,
        unread,
    )


def _is_pointwise(tower: MllmTower) -> bool:
    connector = tower.config.connector
    return connector["type"] in POINTWISE and not connector["positions"] and not tower.config.through_image_connector


def _item_patches(
    of_view: Patches, num_views: int, size: tuple | None, tower: MllmTower, *, num_patches: int
) -> Patches | None:
    """Of an item's vectors: its views' are connected, and then arranged.

    Args:
        of_view: Of what the connector reads of a view.
        num_views: Of the item.
        size: Of the item, None where it is a view.
        tower: Has the connector.
        num_patches: Of a view.
    """
    views = [in_view(of_view, number, num_patches) for number in range(num_views)]
    rule = tower.rule
    parts = [connected_patches(one, rule.connector) for one in ([torch.cat(views)] if rule.is_joined else views)]
    known = [one for one in parts if one is not None]
    if len(known) < len(parts):
        return None
    return _arranged(known, size, tower.connector.arrangement)


def _arranged(parts: list[Patches], size: tuple | None, arrangement: torch.nn.Module | None) -> Patches:
    """Of vectors in the order that the language model reads them in: the arrangement itself arranges their numbers."""
    patches = torch.cat(parts)
    if arrangement is None or size is None:
        return patches
    device = next(arrangement.parameters(), patches).device
    numbers = torch.arange(len(patches), dtype=torch.float64, device=device)[:, None]
    learned: dict[str, Tensor] = {name: numbers.new_full((1,), -1.0) for name, _ in arrangement.named_parameters()}
    order = functional_call(arrangement, learned, ([numbers.split([len(one) for one in parts])], [size]))
    return at_places(patches, order.long().cpu())


def _grid(num_views: int, num_vectors: int, rule: MediaRule) -> tuple[int, int, int] | None:
    is_mapped = isinstance(rule, ImageTokenRule) and rule.tiles is not None and rule.tiles.order == "rows"
    if rule.connector.kind not in ("each", "grid") or is_mapped:
        return None
    return square_grid(num_views, num_vectors)


def _tiles(num_views: int, size: tuple | None, rule: MediaRule) -> tuple[int | None, tuple[int, int] | None]:
    """Which of an item's views shows the whole of it, and rows and columns of the others."""
    if not isinstance(rule, ImageTokenRule) or rule.tiles is None or size is None or num_views == 1:
        return None, None
    overview = {"first": 0, "last": num_views - 1, "none": None}[rule.tiles.overview]
    return overview, rule.tiles.grid((int(size[0]), int(size[1])), rule.image_size)
