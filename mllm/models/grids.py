"""Grids of image features: brought to one size, they can be joined cell by cell. Pure functions."""

import torch
from torch.nn import functional

from mllm.shapes import Float, Tensor

Grid = Float[Tensor, "views _ _ _"]
"""Rows and columns of cells, each with its channels: [views, D, rows, columns]."""


def grid_of_tokens(tokens: Float[Tensor, "views L D"], num_prefix_tokens: int) -> Grid:
    """The square of patches behind what stands in front of them."""
    patches = tokens[:, num_prefix_tokens:]
    side = round(patches.shape[1] ** 0.5)
    return patches.transpose(1, 2).unflatten(2, (side, side))


def align_grid(grid: Grid, side: int) -> Grid:
    """Bring a square grid to a larger side.

    To a multiple of its own, every cell is repeated: SPHINX does so to the 8 x 8 cells of its ConvNeXt. To any other,
    values are interpolated between the cells' centres, bilinearly.
    """
    own = grid.shape[-1]
    if own == side:
        return grid
    if side % own == 0:
        return grid.repeat_interleave(side // own, dim=2).repeat_interleave(side // own, dim=3)
    return functional.interpolate(grid, (side, side), mode="bilinear", align_corners=False)


def join_channels(grids: list[Grid], side: int) -> Float[Tensor, "views cells _"]:
    """Grids as one sequence of cells, row by row, each with the channels of all of them."""
    return torch.cat([align_grid(grid, side) for grid in grids], dim=1).flatten(2).transpose(1, 2)
