"""Qwen-VL: pictures and videos of any size, which its encoder reads one behind the other as one sequence of patches.

Squares of patches follow one another, and each is merged into a vector. Qwen2.5-VL sorts them by windows meanwhile.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch

from mllm.pruning.encodings import Encoding, SeenItem
from mllm.pruning.scoring import QueriesKeys
from mllm.pruning.stock_reader import StockReader, replaced
from mllm.shapes import Float, Int, Tensor


class GridReader(StockReader):
    """Qwen3-VL."""

    def why_unread(self) -> str | None:
        """Nothing is in its way."""
        return None

    def take_hold(self, stack: ExitStack) -> None:
        """Nothing has to be watched."""

    def start(self) -> None:
        """Forget what was seen before."""
        super().start()
        self.order: Int[Tensor, " squares"] | None = None

    def encoding(self, modality: str, arguments: Mapping[str, Any], lengths: list[int]) -> Encoding:
        """See `StockReader.encoding`."""
        side = self.model.config.vision_config.spatial_merge_size
        grids = arguments[f"{modality}_grid_thw"].tolist()
        items, first = [], 0
        for frames, rows, columns in grids:
            squares = torch.arange(frames * rows * columns).view(-1, side**2)
            items.append(SeenItem(slice(first, first + frames), squares, (frames, rows // side, columns // side)))
            first += frames
        shapes = [(frames, rows * columns) for frames, rows, columns in grids]

        def parted(read: QueriesKeys) -> list[QueriesKeys]:
            queries, keys = (_views(self._in_order(one, side**2), shapes) for one in (read.queries, read.keys))
            return [QueriesKeys(one, other, read.scaling) for one, other in zip(queries, keys, strict=True)]

        return Encoding(first, 0, items, parted=parted)

    def _in_order(self, values: Float[Tensor, "1 H T d"], size: int) -> Float[Tensor, "H T d"]:
        if self.order is None:
            return values[0]
        return values[0].unflatten(1, (-1, size))[:, self.order.argsort()].flatten(1, 2)


class WindowReader(GridReader):
    """Qwen2.5-VL."""

    def take_hold(self, stack: ExitStack) -> None:
        """Put a method on the encoder, and its removal on the stack."""
        encoder = self.backbone.visual
        name = "permute_input_for_window_attn"
        replaced(stack, encoder, name, self._sorting(encoder.permute_input_for_window_attn))

    def _sorting(self, own: Callable) -> Callable:
        @wraps(own)
        def permute_input_for_window_attn(values: Tensor, window_index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.order = window_index
            return own(values, window_index, *args, **kwargs)

        return permute_input_for_window_attn


def _views(values: Float[Tensor, "H T d"], shapes: list[tuple[int, int]]) -> list[Float[Tensor, "_ H _ d"]]:
    """Of each item, by its views: frames, and the patches of each."""
    parts = values.split([frames * patches for frames, patches in shapes], dim=1)
    return [part.unflatten(1, shape).transpose(0, 1) for part, shape in zip(parts, shapes, strict=True)]
