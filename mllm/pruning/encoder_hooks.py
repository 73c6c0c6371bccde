"""What a model's encoder did while it encoded the items at hand, for pruners that read it."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mllm.errors import OptionError
from mllm.models.parts import layers_of, parts_of
from mllm.pruning.anatomy import Anatomy
from mllm.pruning.base import Item
from mllm.pruning.encodings import Encoding, SeenItem
from mllm.pruning.evidence import Evidence
from mllm.pruning.scoring import QueriesKeys, queries_and_keys
from mllm.shapes import MediaVectors


class EncoderHooks:
    """Reads queries and keys of some of an encoder's layers while it runs.

    Args:
        anatomy: Of the model.
        wanted: Of which layers; see `Pruner.encoder_layers`.
    """

    def __init__(self, anatomy: Anatomy, wanted: tuple[int, ...]):
        self.anatomy = anatomy
        self.wanted = wanted
        self.calls: dict[int, list[QueriesKeys]] = {}
        self.num_used = 0
        self.is_reading = False

    def take_hold(self, stack: ExitStack) -> None:
        """Put hooks on the encoder's layers."""
        if not self.wanted:
            return
        names = layers_of(self.anatomy.model, parts_of(self.anatomy.model)["image.encoder"])
        if not names:
            raise OptionError(
                "an encoder without a list of layers",
                expected="an encoder whose attention ranks its patches",
                do="choose a pruner that needs none of it: divprune, random, uniform",
            )
        for number in self.wanted:
            layer = self.anatomy.model.get_submodule(names[number])
            stack.callback(layer.register_forward_pre_hook(self._before(number), with_kwargs=True).remove)

    def items(self, modality: str, vectors: list[MediaVectors], encoding: Encoding) -> list[Item]:
        """The items that the encoder was called for, with what it tells of each.

        Args:
            modality: "image" or "video".
            vectors: Of each item.
            encoding: How they came to be.
        """
        if not self.calls:
            return [Item(modality, one, None, None) for one in vectors]
        layers = {number: self._taken(calls, encoding.num_views) for number, calls in self.calls.items()}
        self.num_used += encoding.num_views
        if self.num_used == sum(len(call.queries) for call in next(iter(self.calls.values()))):
            self.calls, self.num_used = {}, 0
        return [
            Item(modality, one, self._evidence(layers, seen, encoding), seen.grid)
            for one, seen in zip(vectors, encoding.items, strict=True)
        ]

    def _taken(self, calls: list[QueriesKeys], num_views: int) -> QueriesKeys:
        """Of the views of one modality: frames and pictures go through one encoder, one behind the other."""
        rows = slice(self.num_used, self.num_used + num_views)
        queries, keys = (torch.cat([getattr(call, name) for call in calls])[rows] for name in ("queries", "keys"))
        return QueriesKeys(queries, keys, calls[0].scaling)

    def _evidence(self, layers: dict[int, QueriesKeys], seen: SeenItem, encoding: Encoding) -> Evidence | None:
        if seen.patches is None:
            return None
        views = seen.views
        own = {number: QueriesKeys(one.queries[views], one.keys[views], one.scaling) for number, one in layers.items()}
        features = None if encoding.features is None else encoding.features[views].flatten(0, 1)
        return Evidence(own, encoding.num_prefix_tokens, seen.patches, features, encoding.connect)

    def _before(self, number: int) -> Any:
        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.is_reading:
                return
            self.is_reading = True
            try:
                self.calls.setdefault(number, []).append(queries_and_keys(layer, args, kwargs))
            finally:
                self.is_reading = False

        return hook
