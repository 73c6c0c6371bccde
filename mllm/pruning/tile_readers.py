"""Stock models that rearrange what their encoder gave: they shuffle pixels, pack tiles into a map, pool frames.

While their own code does so, it is asked to do the same to numbers of patches, so nothing of it is written down here a
second time.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any, ClassVar, NamedTuple

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from mllm.pruning.encodings import SeenItem
from mllm.pruning.patches import Patches, at_places, in_view, resized_places
from mllm.pruning.stock_reader import StockReader, replaced
from mllm.shapes import Float, Int, Tensor

ENDLESS = "anyres_max_1000000"
"""Of LLaVA-OneVision: up to how many tiles an image is not made smaller."""


class _Layout(NamedTuple):
    """Of a picture in tiles: its views, which of their features each of its vectors is, rows and columns of tiles."""

    num_views: int
    places: Int[Tensor, "_ _"]
    tiles: tuple[int, int] | None


class ShuffleReader(StockReader):
    """InternVL, whose connector reads squares of patches."""

    is_pointwise = False
    shuffler: ClassVar[str] = ""

    def start(self) -> None:
        """Forget what was seen before."""
        super().start()
        self.places: Int[Tensor, "V q"] | None = None

    def take_hold(self, stack: ExitStack) -> None:
        """Put hooks on the model, and their removal on the stack."""
        # Below the root: an adapter may stand around a connector, beside whose copy is the original.
        for owner in self.backbone.get_submodule(self.shuffler).modules():
            if "pixel_shuffle" in dir(type(owner)):
                replaced(stack, owner, "pixel_shuffle", self._pixel_shuffle(owner.pixel_shuffle))

    def connected(self, of_view: Patches) -> Patches:
        """The patches of each square."""
        assert self.places is not None
        return at_places(of_view, self.places)

    def why_unread(self) -> str | None:
        """Nothing is in its way."""
        return None

    @property
    def num_prefix_tokens(self) -> int:
        """A class token."""
        return 1

    def _pixel_shuffle(self, own: Callable) -> Callable:
        @wraps(own)
        def pixel_shuffle(features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.features = features.flatten(1, -2)
            numbers = torch.arange(self.features.shape[1]).view(1, *features.shape[1:-1], 1)
            self.places = own(numbers, *args, **kwargs).flatten(0, -2)
            return own(features, *args, **kwargs)

        return pixel_shuffle


class TileShuffleReader(ShuffleReader):
    """SmolVLM and Idefics3: the same in their connector, behind a SigLIP."""

    connector = "connector"
    shuffler = "connector"

    @property
    def num_prefix_tokens(self) -> int:
        """None."""
        return 0

    def _num_dropped(self, arguments: Mapping[str, Any]) -> int:
        return 0


class PackReader(StockReader):
    """LLaVA-NeXT: an overview, then tiles as one map without what was filled up, a vector behind each of its lines."""

    def start(self) -> None:
        """Forget what was seen before."""
        super().start()
        self.layouts: list[_Layout] = []

    def take_hold(self, stack: ExitStack) -> None:
        """Put hooks on the model, and their removal on the stack."""
        super().take_hold(stack)
        replaced(stack, self.backbone, "pack_image_features", self._pack(self.backbone.pack_image_features))

    def items(self, modality: str, of_view: Patches, lengths: list[int], num_views: int) -> list[SeenItem]:
        """See `StockReader.items`."""
        num_patches, items, first = int(of_view.max()) + 1, [], 0
        for count, places, tiles in self.layouts:
            views = torch.cat([in_view(of_view, number, num_patches) for number in range(count)])
            overview = None if tiles is None else 0
            items.append(self.seen(first, count, at_places(views, places), overview=overview, tiles=tiles))
            first += count
        return items

    def _pack(self, own: Callable) -> Callable:
        @wraps(own)
        def pack_image_features(
            image_features: Any, image_sizes: Any, *args: Any, image_newline: Any = None, **kwargs: Any
        ) -> Any:
            args = (image_sizes, *args)
            packed = own(image_features, *args, image_newline=image_newline, **kwargs)
            numbers = [_numbers(one) for one in image_features]
            end = None if image_newline is None else torch.tensor([-1.0], dtype=torch.float64)
            whole = {**kwargs, **({"vision_aspect_ratio": ENDLESS} if "vision_aspect_ratio" in kwargs else {})}
            places = own(numbers, *args, image_newline=end, **whole)[0]
            # Where an image was made smaller, it is no longer of single patches that its vectors are made.
            flags = own([torch.zeros_like(one) for one in numbers], *args, image_newline=end, **kwargs)[0]
            self.layouts = [
                _Layout(len(one), _resized(cells.long(), marks, len(one[0])), self._tiles(len(one), size))
                for one, cells, marks, size in zip(image_features, places, flags, image_sizes, strict=True)
            ]
            return packed

        return pack_image_features

    def _tiles(self, num_views: int, size: Int[Tensor, " 2"]) -> tuple[int, int] | None:
        """Rows and columns of the tiles of a picture of some height and width."""
        if num_views == 1:
            return None
        config = self.model.config
        return get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)


class PackAndPoolReader(PackReader):
    """LLaVA-OneVision: pictures as LLaVA-NeXT; of a video the frames are pooled, and one vector ends it."""

    def take_hold(self, stack: ExitStack) -> None:
        """Put hooks on the model, and their removal on the stack."""
        super().take_hold(stack)
        replaced(stack, self.backbone, "apply_pooling", self._pool(self.backbone.apply_pooling))

    def _pool(self, own: Callable) -> Callable:
        @wraps(own)
        def apply_pooling(image_features: Tensor) -> Tensor:
            pooled = own(image_features)
            sides = [round(number**0.5) for number in (image_features.shape[1], pooled.shape[1])]
            self.pooled = resized_places(sides[0], sides[0], to=(sides[1], sides[1]))
            return pooled

        return apply_pooling

    def items(self, modality: str, of_view: Patches, lengths: list[int], num_views: int) -> list[SeenItem]:
        """See `StockReader.items`."""
        if modality == "image":
            return super().items(modality, of_view, lengths, num_views)
        num_patches, items, first = int(of_view.max()) + 1, [], 0
        of_frame = at_places(of_view, self.pooled)
        end = of_frame.new_full((1, of_frame.shape[1]), -1)
        for length in lengths:
            count = (length - len(end)) // len(of_frame)
            frames = [in_view(of_frame, number, num_patches) for number in range(count)]
            items.append(self.seen(first, count, torch.cat([*frames, end])))
            first += count
        return items


def _numbers(features: Float[Tensor, "views L D"]) -> Float[Tensor, "views L 1"]:
    """A number for each feature of an item's views, in place of it."""
    views, length, _ = features.shape
    return torch.arange(views * length, dtype=torch.float64).view(views, length, 1)


def _resized(cells: Int[Tensor, "_ 1"], marks: Float[Tensor, "_ 1"], num_overview: int) -> Int[Tensor, "_ _"]:
    """Which features an item's vectors are made of, where its map may have been made smaller.

    Args:
        cells: The number of a feature for each of its vectors before that, -1 for the ends of lines.
        marks: Of each vector afterwards, -1 for the ends of lines.
        num_overview: How many stand in front of the map.
    """
    if len(cells) == len(marks):
        return cells
    ends = int((marks < 0).sum())
    rows = int((cells < 0).sum())
    map_of_cells = cells[num_overview:, 0].view(rows, -1)[:, :-1]
    columns = (len(marks) - num_overview) // ends - 1
    corners = resized_places(rows, map_of_cells.shape[1], to=(ends, columns))
    lines = map_of_cells.reshape(-1)[corners].view(ends, columns, 4)
    lines = torch.cat([lines, lines.new_full((ends, 1, 4), -1)], dim=1).flatten(0, 1)
    overview = torch.cat([cells[:num_overview], cells.new_full((num_overview, 3), -1)], dim=1)
    return torch.cat([overview, lines])
