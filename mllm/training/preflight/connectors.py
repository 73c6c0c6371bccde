"""What a connector keeps for the backward. It is found by running it, alone, on one view or one item of zeros.

Some vectors go through some of its layers, others through others: features until they are merged or read, queries from
the first layer to the last. A connector is small beside what stands before and behind it.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mllm.models.connectors import Question
from mllm.models.media import VALUES
from mllm.models.modeling import MllmTower
from mllm.shapes import Tensor
from mllm.sizes import ImageTokenRule, MediaRule
from mllm.sizes.audio import AudioTokenRule
from mllm.sizes.video import VideoTokenRule
from mllm.training.preflight.memory import Layers


def num_views(kind: str, batch: Mapping[str, Any]) -> int:
    """How many views of one kind a batch has."""
    given = (batch.get(name) for name in (VALUES[kind], f"{kind}_features"))
    return max((len(one) for one in given if one is not None), default=0)


def connector_layers(kind: str, tower: MllmTower, layers: Layers, batch: Mapping[str, Any]) -> tuple[Layers, int]:
    """The layers of a connector, whose "position" is a view or, where it reads whole items, an item; and how many.

    Args:
        kind: "image", "audio" or "video".
        tower: The connector's.
        layers: As a stack that every position goes through.
        batch: The largest micro-batch.
    """
    views = num_views(kind, batch)
    if not views:
        return layers, 0
    sizes, count, shown = batch.get(f"{kind}_sizes"), views, 1
    if tower.connector.options.per == "item" and sizes is not None:
        count = len(sizes)
        sizes = sizes[sizes.reshape(count, -1).prod(-1).argmax()][None]
        shown = _views_of(tower.rule, sizes[0].tolist())
    else:
        sizes = None
    features = torch.zeros(shown, *feature_shape(tower), device=tower.device, dtype=tower.dtype)
    with _counting(tower.connector) as numbers, torch.no_grad():
        tower.connect(features, sizes, _question(kind, batch, tower.device))
    stacked = max(layers.count, 1)
    # Of a stack, what enters a layer again is a fair share of what all of its layers have.
    entering = features.numel() if not layers.count else math.ceil(numbers["in"] / max(numbers["calls"], 1))
    return replace(layers, widths=(numbers["all"] // stacked,) * stacked, inputs=(entering,) * stacked), count


def feature_shape(tower: MllmTower) -> tuple[int, int]:
    """Of a view's features, as they come to the connector."""
    if lengths := tower.config.feature_lengths:
        return sum(lengths), max(tower.config.feature_sizes)
    rule = tower.rule
    length = rule.views((1, 1))[0] if isinstance(rule, ImageTokenRule) else rule.features
    return int(length), tower.config.feature_sizes[0]


def _views_of(rule: MediaRule, size: Any) -> int:
    """Views of the item of which a batch says this."""
    if isinstance(rule, VideoTokenRule):
        return len(rule.views_of_frames(size))
    return len(rule.views((size / rule.sampling_rate,) if isinstance(rule, AudioTokenRule) else tuple(size)))


def _question(kind: str, batch: Mapping[str, Any], device: torch.device) -> Question | None:
    """Of one item."""
    ids, mask = (batch.get(f"{kind}_question_{name}") for name in ("ids", "mask"))
    return None if ids is None or mask is None else Question(ids[:1].to(device), mask[:1].to(device))


@contextmanager
def _counting(module: nn.Module) -> Iterator[dict[str, int]]:
    """Count the numbers that go in and out of linear modules: "in", "all", and the "calls"."""
    numbers = {"in": 0, "all": 0, "calls": 0}

    def count(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        numbers["in"] += given[0].numel()
        numbers["all"] += given[0].numel() + made.numel()
        numbers["calls"] += 1

    handles = [one.register_forward_hook(count) for one in module.modules() if isinstance(one, nn.Linear)]
    try:
        yield numbers
    finally:
        for handle in handles:
            handle.remove()
