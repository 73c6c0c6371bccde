"""The connected views of an image in the order that the language model reads them in, learned vectors between them."""

from collections.abc import Sequence

import torch
from torch import nn

from mllm.shapes import Float, Tensor
from mllm.sizes import ImageTokenRule
from mllm.sizes.lengths import square_side
from mllm.sizes.tiles import Grid, TileRule

Vectors = Float[Tensor, "_ D"]
"""Of a view, or of an item; unlike ones meet here, so their number has no name."""


class Arrangement(nn.Module):
    """Puts overview and tiles together as `mllm.sizes.tiles.TileRule` says: its `arranged` counts what comes out here.

    Args:
        rule: With tiles.
        out_size: Width of the language model.
    """

    def __init__(self, rule: ImageTokenRule, *, out_size: int):
        super().__init__()
        self.rule = rule
        for name in self._tiles.vectors:
            # The spread of stock LLaVA-NeXT's.
            self.register_parameter(name, nn.Parameter(torch.randn(out_size) * out_size**-0.5))

    @property
    def _tiles(self) -> TileRule:
        assert self.rule.tiles is not None
        return self.rule.tiles

    def lengths(self, items: Sequence[Sequence[Vectors]], sizes: Sequence[Grid] | None) -> list[int]:
        """How many vectors each item becomes."""
        views = [tuple(map(len, item)) for item in items]
        if sizes is None:
            return list(map(sum, views))
        return [self.rule.arranged(size, lengths) for size, lengths in zip(sizes, views, strict=True)]

    def forward(self, items: Sequence[Sequence[Vectors]], sizes: Sequence[Grid] | None) -> Vectors:
        """Arrange the views of each item; the items follow one another in one tensor, see `Connector.forward`.

        Args:
            items: The vectors of each of its views.
            sizes: Height and width of each image. None for views that belong to no image; they stay as they are, but
                the learned vectors get their gradient: ranks without images train them, too.
        """
        if sizes is None:
            nothing = sum(0.0 * vector.sum() for vector in self.parameters())
            return torch.cat([view for views in items for view in views]) + nothing
        arrange = {"rows": self._as_map, "views": self._one_by_one}[self._tiles.order]
        return torch.cat([arrange(views, size) for views, size in zip(items, sizes, strict=True)])

    def _as_map(self, views: Sequence[Vectors], size: Grid) -> Vectors:
        """The overview, then the tiles as one map, line by line; see `LlavaNextModel.pack_image_features`."""
        rows, columns = self._tiles.grid(size, self.rule.image_size)
        overview, tiles = self._tiles.parted(views, (rows, columns))
        side = square_side(len(tiles[0]))
        cells = torch.stack(list(tiles)).view(rows, columns, side, side, -1)
        cells = cells.transpose(1, 2).reshape(rows * side, columns * side, -1)
        lines, length, _ = cells.shape
        top, left = self._tiles.margins(size, (lines, length))
        cells = cells[top : lines - top, left : length - left]
        if self._tiles.vectors:
            newline = self.newline.to(cells.dtype).expand(len(cells), 1, -1)
            cells = torch.cat([cells, newline], dim=1)
        return self._tiles_joined(overview, cells.flatten(0, 1))

    def _one_by_one(self, views: Sequence[Vectors], size: Grid) -> Vectors:
        """View after view, each between its start and its end; see SPHINX (arXiv 2311.07575)."""
        if not self._tiles.vectors:
            return torch.cat(list(views))
        start, end = (vector.to(views[0].dtype)[None] for vector in (self.start, self.end))
        return torch.cat([part for view in views for part in (start, view, end)])

    def _tiles_joined(self, overview: Sequence[Vectors], cells: Vectors) -> Vectors:
        parts = [*overview, cells] if self._tiles.overview == "first" else [cells, *overview]
        return torch.cat(parts)
