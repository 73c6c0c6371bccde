"""Grids and token counts of tiles: what stock models choose and count, and numbers worked out by hand."""

import numpy as np
import pytest
import torch
from transformers import LlavaNextConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

from mllm.assemble.tiles import TILES, tile_rule
from mllm.errors import OptionError, RowError
from mllm.sizes import ImageTokenRule, LengthRule, TileRule, num_tokens, read_rule, written_rule
from mllm.sizes.tiles import grids_within

EDGES = [1, 2, 5, 27, 28, 29, 56, 84, 200, 336, 671, 672, 1008, 4000]
SIZES = [
    *((height, width) for height in EDGES for width in EDGES if max(height, width) <= 200 * min(height, width)),
    *map(tuple, np.random.default_rng(0).integers(1, 2000, (100, 2)).tolist()),
]
CLIP = ImageTokenRule(336, 14, 1, "default", tiles=TILES["llava_next"])


def _pinpoints(tiles: TileRule, side: int) -> list[list[int]]:
    return [[rows * side, columns * side] for rows, columns in tiles.grids]


@pytest.mark.parametrize("side", [28, 336])
@pytest.mark.parametrize(
    "choice",
    [
        "llava_next",
        {"type": "llava_next", "grids": [[2, 2], [1, 3], [3, 1], [1, 2], [2, 1]]},
        {"type": "llava_next", "max_tiles": 9, "min_tiles": 2},
    ],
    ids=["its own", "the largest first", "a budget"],
)
def test_the_grid_is_that_of_llava_next(side, choice):
    tiles = tile_rule(choice)
    pinpoints = _pinpoints(tiles, side)
    for size in SIZES:
        height, width = select_best_resolution(size, pinpoints)
        assert tiles.grid(size, side) == (height // side, width // side), size
        assert tiles.num_views(size, side) == image_size_to_num_patches(size, pinpoints, side), size


@pytest.mark.parametrize("side", [28, 448])
@pytest.mark.parametrize(("least", "most"), [(1, 12), (2, 6), (1, 1), (4, 4)])
def test_the_grid_is_that_of_internvl(side, least, most):
    tiles = tile_rule({"type": "internvl", "min_tiles": least, "max_tiles": most})
    for size in SIZES:
        columns, rows = get_optimal_tiled_canvas(size, (side, side), least, most)
        assert tiles.grid(size, side) == (rows, columns), size
        assert tiles.num_views(size, side) == rows * columns + (rows * columns > 1)


def test_counts_are_the_lengths_of_what_llava_next_packs():
    config = LlavaNextConfig(image_grid_pinpoints=_pinpoints(CLIP.tiles, 336))
    with torch.device("meta"):
        model = LlavaNextModel(LlavaNextConfig(text_config={"model_type": "llama", "num_hidden_layers": 0}))
    model.config = config
    for size in SIZES:
        views = torch.zeros(len(CLIP.views(size)), 576, 1)
        _, [length] = model.pack_image_features([views], [size], "default", image_newline=torch.zeros(1))
        assert num_tokens(size, CLIP) == length, size


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        # 24 x 24 patches a tile. 672 x 672 fills the grid (2, 2): 48 lines of 48 cells and a newline.
        ("llava_next", (672, 672), 576 + 48 * 49),
        # The grid (1, 2): half as high as wide, nothing to fill up.
        ("llava_next", (500, 1000), 576 + 24 * 49),
        # 1:1.5 in (2, 2): 32 of 48 lines show it.
        ("llava_next", (400, 600), 576 + 32 * 49),
        # 1:3 fills (1, 3) where it has pixels for it; else (1, 2) shows all of them, in 16 of 24 lines.
        ("llava_next", (300, 900), 576 + 24 * 73),
        ("llava_next", (100, 300), 576 + 16 * 49),
        # As thin as images may be: no line is left.
        ("llava_next", (1, 200), 576),
        ("internvl", (300, 300), 576),
        ("internvl", (600, 600), 5 * 576),
        ("internvl", (300, 900), 4 * 576),
        ("sphinx", (300, 900), 5 * 578),
    ],
)
def test_counts_by_hand(name, size, tokens):
    assert num_tokens(size, ImageTokenRule(336, 14, 1, "default", tiles=TILES[name])) == tokens


def test_counts_behind_a_connector():
    # Squares of 2 x 2 become one: 12 x 12 vectors a tile; 400 x 600 shows in 16 of 24 lines.
    merged = ImageTokenRule(336, 14, 1, "default", LengthRule("grid", 2), tiles=TILES["llava_next"])
    assert num_tokens((400, 600), merged) == 144 + 16 * 25
    queries = ImageTokenRule(336, 14, 1, "default", LengthRule("fixed", tokens=32), tiles=TILES["sphinx"])
    assert num_tokens((400, 600), queries) == 5 * 34
    joined = ImageTokenRule(
        336, 14, 1, "default", LengthRule("fixed", tokens=32), is_joined=True, tiles=TILES["sphinx"]
    )
    assert num_tokens((400, 600), joined) == 34


@pytest.mark.parametrize("name", TILES)
def test_no_image_has_more_views_than_the_most(name):
    rule = ImageTokenRule(336, 14, 1, "default", tiles=TILES[name])
    counts = [len(rule.views(size)) for size in SIZES]
    assert max(counts) == rule.most_views


@pytest.mark.parametrize("name", TILES)
def test_a_rule_is_read_as_it_was_written(name):
    rule = ImageTokenRule(336, 14, 1, "default", tiles=TILES[name])
    written = written_rule(rule)
    assert read_rule(written) == rule
    written["tiles"]["grids"] = [list(grid) for grid in written["tiles"]["grids"]]  # as JSON has them
    assert read_rule(written) == rule


def test_a_rule_of_before_tiles_has_none():
    written = written_rule(ImageTokenRule(336, 14, 1, "default"))
    del written["tiles"]
    assert read_rule(written).tiles is None


def test_grids_within_a_budget():
    assert grids_within(1, 4) == ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (2, 2), (1, 4))
    assert grids_within(3, 4) == grids_within(1, 4)[3:]
    for least, most in ((0, 4), (5, 4), (-1, -1)):
        with pytest.raises(OptionError, match=f"min_tiles = {least}, max_tiles = {most}"):
            grids_within(least, most)


def test_an_image_without_pixels_has_no_tiles():
    with pytest.raises(RowError, match="0 x 7 pixels"):
        num_tokens((0, 7), CLIP)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choice": "largest"}, "choice = 'largest'"),
        ({"overview": "both"}, "overview = 'both'"),
        ({"grids": ()}, "grids = "),
        ({"grids": ((0, 2),)}, "grids = "),
        ({"overview": "none"}, "overview = 'none' for a map"),
        ({"order": "views"}, "'newline' with order = 'views'"),
        ({"separators": "ends"}, "'ends' with order = 'rows'"),
    ],
)
def test_rules_that_make_no_sense(fields, message):
    with pytest.raises(OptionError, match=message):
        TileRule(**{"grids": ((1, 2),), **fields})
