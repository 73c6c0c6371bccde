"""Which patches are behind vectors: what connectors do to features, done to their numbers. Pure.

The patches of an item are counted through all of its views, row by row; -1 is none, where a vector has fewer than
others (at the edge of a grid), or is of no patch at all (a class token, the end of a line).
"""

import torch

from mllm.shapes import Int, Tensor
from mllm.sizes import LengthRule
from mllm.sizes.lengths import square_side

Patches = Int[Tensor, "_ _"]
"""Of each vector [V, p]."""


def feature_patches(num_features: int, num_leading: int) -> Int[Tensor, "L 1"]:
    """Of a view's features, the first `num_leading` of which are no patches."""
    return (torch.arange(num_features) - num_leading).clamp(min=-1)[:, None]


def in_view(patches: Patches, number: int, num_patches: int) -> Patches:
    """Of a view's vectors, counted through all views, from what they are in their own.

    Args:
        patches: In the view.
        number: Of the view.
        num_patches: Of each view.
    """
    return torch.where(patches >= 0, patches + number * num_patches, -1)


def at_places(patches: Patches, places: Int[Tensor, "W q"]) -> Patches:
    """Of vectors that stand for several others, from which those are; -1 for none.

    Args:
        patches: Of the others.
        places: Which of them each stands for.
    """
    found = patches[places.clamp(min=0)]
    return torch.where(places[..., None] >= 0, found, -1).flatten(1)


def connected_patches(patches: Patches, rule: LengthRule) -> Patches | None:
    """Of the vectors that a connector makes of features; None where each has something of all.

    Args:
        patches: Of the features.
        rule: How many vectors the connector makes of them.
    """
    if rule.kind == "each":
        return patches
    if rule.kind == "fixed":
        return None
    windows = _squares(len(patches), rule.size) if rule.kind == "grid" else _runs(len(patches), rule.size)
    windows = windows[: rule.count(len(patches)) // rule.tokens].repeat_interleave(rule.tokens, dim=0)
    return at_places(patches, windows)


def resized_places(rows: int, columns: int, *, to: tuple[int, int]) -> Int[Tensor, "W 4"]:
    """Which cells of a grid the cells of a resized one are interpolated between, bilinearly.

    Args:
        rows: Of the grid.
        columns: Of the grid.
        to: Rows and columns of the resized one.
    """
    above, below = _neighbours(rows, to[0])
    left, right = _neighbours(columns, to[1])
    corners = [row[:, None] * columns + column for row in (above, below) for column in (left, right)]
    return torch.stack(corners, dim=-1).flatten(0, 1)


def _neighbours(length: int, to: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The cells of a line to either side of the centres of those of a resized one."""
    centres = ((torch.arange(to, dtype=torch.float64) + 0.5) * length / to - 0.5).clamp(min=0)
    first = (centres + 1e-9).floor().long()
    is_between = centres - first > 1e-9
    return first, (first + is_between.long()).clamp(max=length - 1)


def _squares(num_features: int, size: int) -> Int[Tensor, "V q"]:
    """The cells of each window of a square grid; those at its end may lack some."""
    side = square_side(num_features)
    cells = torch.arange(num_features).view(side, side)
    cells = torch.nn.functional.pad(cells, (0, -side % size, 0, -side % size), value=-1)
    windows = cells.unflatten(1, (-1, size)).unflatten(0, (-1, size))  # [rows, size, columns, size]
    return windows.transpose(1, 2).flatten(2).flatten(0, 1)


def _runs(num_features: int, size: int) -> Int[Tensor, "V q"]:
    """The features of each window of a sequence; the last may lack some."""
    features = torch.nn.functional.pad(torch.arange(num_features), (0, -num_features % size), value=-1)
    return features.unflatten(0, (-1, size))
