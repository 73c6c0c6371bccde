"""How an image tower reads images in tiles: published ways by name, and what can be changed of each."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mllm.errors import CompositionError, OptionError
from mllm.models.connectors import ConnectorOptions
from mllm.sizes import ImageTokenRule, TileRule
from mllm.sizes.lengths import square_side
from mllm.sizes.tiles import grids_within

Tiles = str | Mapping[str, Any]
"""A name in `TILES`, or a mapping with `type` and what differs from it: fields of `TileRule`, and a budget.

The budget is `min_tiles` and `max_tiles`: of `grids` that are given those beyond it are left out, else all within it
are taken.
"""

TILES: dict[str, TileRule] = {
    # arXiv 2310.03744 and the LLaVA-NeXT release: `image_grid_pinpoints` of 336, 672 and 1,008 pixels.
    "llava_next": TileRule(grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))),
    # InternVL 1.5 and later (arXiv 2404.16821): `dynamic_preprocess` with a thumbnail.
    "internvl": TileRule(
        grids=grids_within(1, 12), choice="shape", fit="squash", overview="last", order="views", separators="none"
    ),
    # SPHINX (arXiv 2311.07575) at twice its encoders' size: one view and its four quarters.
    "sphinx": TileRule(grids=((2, 2),), fit="pad", fill="mean", order="views", separators="ends"),
}
"""What each name stands for."""

GEOMETRIES = {"llava_next": "squash", "internvl": "squash", "sphinx": "pad"}
"""How each makes a square of the whole image, for its overview."""

BUDGET = ("min_tiles", "max_tiles")


def tile_rule(choice: Tiles | None) -> TileRule | None:
    """The rule that a plan's `tiles` stand for; None for none.

    Raises:
        OptionError: No such name or field, a value it cannot have, or no grid within the budget.
    """
    if choice is None:
        return None
    fields = _fields(choice)
    preset = TILES[fields.pop("type")]
    budget = {name: fields.pop(name) for name in BUDGET if name in fields}
    known = [field.name for field in dataclasses.fields(TileRule)]
    if unknown := [key for key in fields if key not in known]:
        raise OptionError(
            f"tiles: no option {unknown[0]!r}",
            expected=f"only type, {', '.join((*known, *BUDGET))}",
            do="correct the option, or leave it out",
        )
    if "grids" in fields:
        fields["grids"] = _grids(fields["grids"])
    elif budget:
        fields["grids"] = grids_within(_number(budget, "min_tiles", 1), _number(budget, "max_tiles", 0))
    rule = dataclasses.replace(preset, **fields)
    return dataclasses.replace(rule, grids=_within(rule.grids, budget)) if budget else rule


def geometry_of(tiles: Tiles | None, geometry: str | None) -> str:
    """How the whole image becomes a square: as stated, else as the published way has it, else padded.

    Raises:
        OptionError: The overview would be cropped, and miss what the tiles show.
    """
    if tiles is None:
        return "pad" if geometry is None else geometry
    if geometry == "crop":
        raise OptionError(
            "geometry = 'crop' with tiles", expected="an overview of the whole image", do="set `geometry: squash`"
        )
    return GEOMETRIES[_fields(tiles)["type"]] if geometry is None else geometry


def check_tiles(rule: ImageTokenRule, connector: ConnectorOptions) -> None:
    """Check that a connector can be used on tiles as the rule has it.

    Raises:
        CompositionError: It cannot.
        OptionError: Its vectors are to be read as a map, and are no square.
    """
    tiles = rule.tiles
    if tiles is None:
        return
    if 0 < connector.positions < tiles.most_views:
        raise CompositionError(
            f"a connector with {connector.positions} positions, and tiles with up to {tiles.most_views} views",
            expected="a position for each view of an image",
            do=f"set `positions: {tiles.most_views}` for the connector, or lower `max_tiles`",
        )
    if tiles.order == "views":
        return
    if rule.is_joined or rule.connector.kind not in ("each", "grid") or rule.connector.tokens != 1:
        raise CompositionError(
            f"tiles that are read as one map, and a connector whose vectors have no place in it ({rule.connector})",
            expected="a connector that makes a vector of each feature, or of each square of neighbours, view by view",
            do="set `order: views` with `separators: none` or `ends` under `tiles`, or choose another connector",
        )
    square_side(rule.views((1, 1))[0])


def _fields(choice: Tiles) -> dict[str, Any]:
    fields = {"type": choice} if isinstance(choice, str) else dict(choice)
    if fields.get("type") not in TILES:
        raise OptionError(
            f"tiles: type = {fields.get('type')!r}",
            expected=f"one of {', '.join(TILES)}",
            do="set `tiles` to one of them, or its `type`",
        )
    return fields


def _grids(given: Any) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(rows), int(columns)) for rows, columns in given)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"tiles: grids = {given!r}",
            expected="pairs of numbers: tiles from top to bottom, and from left to right",
            do="write, e.g., `grids: [[1, 2], [2, 1], [2, 2]]`",
        ) from error


def _number(budget: Mapping[str, Any], name: str, default: int) -> int:
    value = budget.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"tiles: {name} = {value!r}", expected="a whole number", do="correct it")
    return value


def _within(grids: tuple[tuple[int, int], ...], budget: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Those of the grids that the budget allows."""
    least, most = _number(budget, "min_tiles", 1), _number(budget, "max_tiles", 1 << 30)
    kept = tuple(grid for grid in grids if least <= grid[0] * grid[1] <= most)
    if not kept:
        raise OptionError(
            f"tiles: no grid of {least} to {most} tiles among {[list(grid) for grid in grids]}",
            expected="at least one grid within the budget",
            do="raise `max_tiles`, or write smaller grids",
        )
    return kept
