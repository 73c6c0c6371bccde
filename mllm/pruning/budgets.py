"""How a budget of tokens is dealt out: to the views of a picture, to the lines of a grid. Pure."""

from collections.abc import Sequence

import torch

from mllm.shapes import Int, Tensor


def evenly(num_tokens: int, count: int) -> Int[Tensor, " n"]:
    """So many places among so many, in the middles of equal stretches."""
    return (2 * torch.arange(count) + 1) * num_tokens // (2 * count)


def evenly_on_grid(grid: tuple[int, int, int], count: int) -> Int[Tensor, " n"]:
    """So many places on a stack of grids, spread over its views, lines and columns.

    Args:
        grid: Views, rows and columns.
        count: From 1 to all of them.
    """
    num_views, num_rows, num_columns = grid
    places = []
    for view, of_view in _dealt(count, num_views, num_views):
        # As far from line to line as from column to column, as near as may be; and no line gets more than it has.
        lines = round((of_view * num_rows / num_columns) ** 0.5)
        lines = max(lines, 1, -(-of_view // num_columns))
        for row, of_row in _dealt(of_view, num_rows, lines):
            places.append(evenly(num_columns, of_row) + (view * num_rows + row) * num_columns)
    return torch.cat(places)


def apportioned(total: int, weights: Sequence[int | float], room: Sequence[int]) -> list[int]:
    """Deal out a whole number in proportion to weights, by largest remainders; none gets more than it has room for.

    What one has no room for is dealt out anew to the others, evenly where none of them has a weight.

    Args:
        total: At most the sum of `room`.
        weights: Not negative.
        room: How many each can take.
    """
    assert total <= sum(room)
    given = [0] * len(room)
    while total > sum(given):
        left = total - sum(given)
        open_ = [one for one in range(len(room)) if given[one] < room[one]]
        whole = sum(weights[one] for one in open_)
        quotas = {one: left * weights[one] / whole if whole else left / len(open_) for one in open_}
        overfull = [one for one in open_ if quotas[one] > room[one] - given[one]]
        if overfull:
            for one in overfull:
                given[one] = room[one]
            continue
        for one in open_:
            given[one] += int(quotas[one])
        by_remainder = sorted(open_, key=lambda one: int(quotas[one]) - quotas[one])
        for one in by_remainder[: total - sum(given)]:
            given[one] += 1
    return given


def _dealt(count: int, num_bins: int, num_used: int) -> list[tuple[int, int]]:
    """Which bins get some of `count` things, dealt out evenly to at most `num_used` of them; and how many each."""
    num_used = min(count, num_bins, num_used)
    bins = evenly(num_bins, num_used).tolist()
    shares = [count * (one + 1) // num_used - count * one // num_used for one in range(num_used)]
    return list(zip(bins, shares, strict=True))
