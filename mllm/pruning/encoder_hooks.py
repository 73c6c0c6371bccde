"""What a model's encoder did while it encoded the items at hand, for pruners that read it."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mllm.errors import OptionError
from mllm.models.parts import layers_of, parts_of
from mllm.pruning.anatomy import Anatomy
from mllm.pruning.base import Item
from mllm.pruning.encodings import Encoding
from mllm.pruning.evidence import Evidence
from mllm.pruning.scoring import QueriesKeys, queries_and_keys
from mllm.shapes import MediaVectors

_ENDS = "cu_seqlens"
"""By this name Qwen-VL's encoder is told where in its one sequence pictures (or windows of them) end."""


class EncoderHooks:
    """Reads queries and keys of some of an encoder's layers while it runs.

    Args:
        anatomy: Of the model.
        wanted: Of which layers; see `Pruner.encoder_layers`.
    """

    def __init__(self, anatomy: Anatomy, wanted: tuple[int, ...]):
        self.anatomy = anatomy
        self.wanted = wanted
        self.is_reading = False
        self.forget()

    def take_hold(self, stack: ExitStack) -> None:
        """Put hooks on the encoder's layers.

        Raises:
            OptionError: It has no such layer.
        """
        if not self.wanted:
            return
        names = layers_of(self.anatomy.model, parts_of(self.anatomy.model)["image.encoder"])
        for number in self.wanted:
            if not -len(names) <= number < len(names):
                raise OptionError(
                    f"layer {number} of an encoder, of which {len(names)} layers are used",
                    expected=f"one from 0 to {len(names) - 1}, or counted from the end, {-len(names)} to -1",
                    do="choose a layer that the encoder has",
                )
            layer = self.anatomy.model.get_submodule(names[number])
            stack.callback(layer.register_forward_pre_hook(self._before(number), with_kwargs=True).remove)

    def forget(self) -> None:
        """Begin anew: what was read so far is of no item to come."""
        self.calls: dict[int, list[QueriesKeys]] = {}
        self.num_used = 0

    def items(self, modality: str, vectors: list[MediaVectors], encoding: Encoding) -> list[Item]:
        """The items that the encoder was called for, with what it tells of each.

        Args:
            modality: "image" or "video".
            vectors: Of each item.
            encoding: How they came to be.
        """
        layers = {number: self._parted(calls, encoding) for number, calls in self.calls.items()}
        self.num_used += encoding.num_views
        return [
            Item(modality, one, self._evidence(layers, number, encoding), seen.grid, encoding.unread)
            for number, (one, seen) in enumerate(zip(vectors, encoding.items, strict=True))
        ]

    def _parted(self, calls: list[QueriesKeys], encoding: Encoding) -> list[QueriesKeys]:
        """Of each item of one modality: frames and pictures may go through one encoder, one behind the other."""
        if encoding.parted is not None:
            return encoding.parted(calls[-1])
        rows = slice(self.num_used, self.num_used + encoding.num_views)
        queries, keys = (torch.cat([getattr(call, name) for call in calls])[rows] for name in ("queries", "keys"))
        return [QueriesKeys(queries[seen.views], keys[seen.views], calls[0].scaling) for seen in encoding.items]

    def _evidence(self, layers: dict[int, list[QueriesKeys]], item: int, encoding: Encoding) -> Evidence | None:
        seen = encoding.items[item]
        if seen.patches is None or not layers:
            return None
        own = {number: items[item] for number, items in layers.items()}
        patches = seen.patches.to(next(iter(own.values())).keys.device)
        features = None if encoding.features is None else encoding.features[seen.views].flatten(0, 1)
        return Evidence(
            own, encoding.num_prefix_tokens, patches, features, encoding.connect, seen.overview, seen.tiles
        )

    def _before(self, number: int) -> Any:
        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.is_reading:
                return
            self.is_reading = True
            if _ENDS in kwargs:  # where the pictures of one sequence end: queries and keys do not depend on it
                kwargs = {**kwargs, _ENDS: torch.tensor([0, len(args[0])], device=args[0].device)}
            try:
                self.calls.setdefault(number, []).append(queries_and_keys(layer, args, kwargs))
            finally:
                self.is_reading = False

        return hook
