"""How an image of any size is cut into tiles, and in what order the vectors of its views stand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from mllm.errors import OptionError, RowError
from mllm.sizes.lengths import square_side

Grid = tuple[int, int]
"""Tiles from top to bottom, and from left to right."""

View = TypeVar("View")

CHOICES = {
    "choice": ("area", "shape"),
    "fit": ("pad", "squash"),
    "fill": ("black", "mean"),
    "overview": ("first", "last", "none"),
    "order": ("rows", "views"),
    "separators": ("newline", "ends", "none"),
}
"""What each field of a rule but its grids can be."""


@dataclass(frozen=True)
class TileRule:
    """How an image is read at a higher resolution than its encoder's: in tiles, and as a whole.

    A tile is a square of the encoder's own size. The image is fitted to a grid of them, which its size alone decides.

    Example: for an encoder of 336 pixels, an image 500 high and 1,000 wide fills LLaVA-NeXT's grid (1, 2): it is seen
    as two tiles and an overview.

    Args:
        grids: Those that an image may be cut in.
        choice: "area" takes the grid that shows most of the image's pixels, and of equal ones the one that wastes
            least (LLaVA-NeXT); "shape" the one whose proportions are nearest, and of equal ones the larger where the
            image has pixels for more than half of it (InternVL).
        fit: "pad" keeps the image's proportions and fills up the grid around it; "squash" stretches it to the grid.
        fill: With what a grid is filled up: "black", or the encoder's "mean" colour.
        overview: Where the view of the whole image stands among the tiles: "first", "last" or "none". It is left out
            of an image that is squashed into a single tile, which would show the same.
        order: "rows" reads the tiles' vectors as one map, line by line, without what was filled up; "views" reads tile
            after tile.
        separators: Learned vectors between those of the image: "newline" at the end of each line of the map, "ends"
            before and behind each view, or "none".
    """

    grids: tuple[Grid, ...]
    choice: str = "area"
    fit: str = "pad"
    fill: str = "black"
    overview: str = "first"
    order: str = "rows"
    separators: str = "newline"

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise OptionError(
                    f"tiles: {name} = {getattr(self, name)!r}", expected=f"one of {', '.join(known)}", do="choose one"
                )
        if not self.grids or any(len(grid) != 2 or min(grid) < 1 for grid in self.grids):
            raise OptionError(
                f"tiles: grids = {[list(grid) for grid in self.grids]}",
                expected="at least one pair of positive numbers: tiles from top to bottom, and from left to right",
                do="write, e.g., `grids: [[1, 2], [2, 1], [2, 2]]`, or set `max_tiles`",
            )
        if (self.order, self.separators) in (("views", "newline"), ("rows", "ends")):
            raise OptionError(
                f"tiles: separators = {self.separators!r} with order = {self.order!r}",
                expected="newlines in a map that is read in rows, ends around views that follow one another",
                do="set `separators: none`, or the other order",
            )
        if (self.order, self.fit, self.overview) == ("rows", "pad", "none"):
            raise OptionError(
                "tiles: overview = 'none' for a map without what was filled up",
                expected="an overview: of an image that is very thin no line of the map is left",
                do="set `overview: first` or `last`, or `fit: squash`",
            )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "TileRule":
        """A rule from plain values, as JSON holds them."""
        return cls(**{**fields, "grids": tuple((int(rows), int(columns)) for rows, columns in fields["grids"])})

    @property
    def most_views(self) -> int:
        """How many views an image has at most."""
        return max(rows * columns + self._has_overview(rows * columns) for rows, columns in self.grids)

    @property
    def vectors(self) -> tuple[str, ...]:
        """The names of the learned vectors."""
        return {"newline": ("newline",), "ends": ("start", "end"), "none": ()}[self.separators]

    def grid(self, size: Grid, side: int) -> Grid:
        """The grid that an image is cut in.

        Args:
            size: Its height and width.
            side: Of a tile, in pixels.

        Raises:
            RowError: It has no pixels.
        """
        if min(size) < 1:
            raise RowError(
                f"an image of {size[0]} x {size[1]} pixels", expected="an image with pixels", do="drop the row"
            )
        return _best_grid(self, size, side)

    def num_views(self, size: Grid, side: int) -> int:
        """How many views an image of this height and width has."""
        rows, columns = self.grid(size, side)
        return rows * columns + self._has_overview(rows * columns)

    def joined(self, overview: View, tiles: Sequence[View]) -> list[View]:
        """All views of an image in their order.

        Args:
            overview: Of the whole.
            tiles: Line by line.
        """
        if not self._has_overview(len(tiles)):
            return list(tiles)
        return [overview, *tiles] if self.overview == "first" else [*tiles, overview]

    def parted(self, views: Sequence[View], grid: Grid) -> tuple[Sequence[View], Sequence[View]]:
        """The inverse of `joined`: the overview, if there is one, and the tiles."""
        tiles = grid[0] * grid[1]
        if len(views) == tiles:
            return [], views
        return (views[:1], views[1:]) if self.overview == "first" else (views[tiles:], views[:tiles])

    def margins(self, size: Grid, canvas: Grid) -> Grid:
        """How many lines at the top and at the bottom of a map, and how many cells at either end of a line, are none.

        They are what was filled up around an image that kept its proportions. An image that is very thin has no line
        left, as in LLaVA-NeXT; only its overview shows it.

        Args:
            size: Height and width of the image.
            canvas: Lines of the map, and cells in a line.
        """
        if self.fit == "squash":
            return 0, 0
        (height, width), (lines, cells) = size, canvas
        # The very arithmetic of `LlavaNextModel.pack_image_features`: other roundings would be off by one cell.
        if width / height > cells / lines:
            return (lines - int(round(height * (cells / width), 7))) // 2, 0
        return 0, (cells - int(round(width * (lines / height), 7))) // 2

    def arranged(self, size: Grid, lengths: Sequence[int], side: int) -> int:
        """How many tokens the connected views of an image become, with what is put between them.

        Args:
            size: Height and width of the image.
            lengths: Of each view.
            side: Of a tile, in pixels.
        """
        if self.order == "views":
            return sum(lengths) + len(self.vectors) * len(lengths)
        rows, columns = self.grid(size, side)
        overview, tiles = self.parted(lengths, (rows, columns))
        cells = square_side(tiles[0])
        canvas = (rows * cells, columns * cells)
        top, left = self.margins(size, canvas)
        lines, length = canvas[0] - 2 * top, canvas[1] - 2 * left
        return sum(overview) + lines * (length + len(self.vectors))

    def _has_overview(self, tiles: int) -> bool:
        return self.overview != "none" and (tiles > 1 or self.fit == "pad")


def grids_within(least: int, most: int) -> tuple[Grid, ...]:
    """All grids of so many tiles: those of fewer tiles first, and of these the higher ones first.

    Example: of at most 4 tiles: (1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (2, 2), (1, 4).

    Raises:
        OptionError: There is none.
    """
    if not 1 <= least <= most:
        raise OptionError(
            f"tiles: min_tiles = {least}, max_tiles = {most}",
            expected="positive numbers, of which the first is not the larger one",
            do="correct them",
        )
    grids = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    return tuple(
        sorted((grid for grid in grids if grid[0] * grid[1] >= least), key=lambda grid: (grid[0] * grid[1], grid[1]))
    )


@lru_cache(maxsize=100_000)
def _best_grid(rule: TileRule, size: Grid, side: int) -> Grid:
    return _by_area(rule.grids, size, side) if rule.choice == "area" else _by_shape(rule.grids, size, side)


def _by_area(grids: tuple[Grid, ...], size: Grid, side: int) -> Grid:
    """As `transformers.image_processing_utils.select_best_resolution`, in its arithmetic; the first of equal ones."""
    height, width = size

    def merit(grid: Grid) -> tuple[int, int]:
        lines, cells = grid[0] * side, grid[1] * side
        scale = min(cells / width, lines / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - lines * cells

    return max(grids, key=merit)


def _by_shape(grids: tuple[Grid, ...], size: Grid, side: int) -> Grid:
    """As `transformers.models.got_ocr2.image_processing_got_ocr2.get_optimal_tiled_canvas`."""
    height, width = size
    best, least = grids[0], float("inf")
    for grid in grids:
        rows, columns = grid
        difference = abs(width / height - columns / rows)
        has_pixels = width * height > 0.5 * side * side * rows * columns
        if difference < least or (difference == least and has_pixels):
            best, least = grid, difference
    return best
