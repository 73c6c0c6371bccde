"""Which rows share a pack: best fit by exact length. Pure: lengths in, positions out."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

WINDOW_PACKS = 128
"""Rows are packed in windows that fill about so many packs: enough for less than 1% to be left empty, few enough for
an epoch's neighbours not to be those of the epoch before."""
_BINS = 1 << 32


def pack_in_windows(order: np.ndarray, lengths: np.ndarray, pack_length: int) -> list[np.ndarray]:
    """Pack an epoch's rows, window by window of its shuffled order.

    Args:
        order: Positions of rows, in the order of the epoch.
        lengths: Tokens of the row at each position.
        pack_length: Tokens of a pack at most; no row has more.

    Returns:
        Positions, pack by pack; each entry of `order` stands in one pack. The least filled pack of a window is packed
        again with the next, so that only the last window has a remainder.
    """
    order, of_order = np.asarray(order, np.int64), lengths[order]
    window = _window_rows(of_order, pack_length)
    packs: list[np.ndarray] = []
    rest = np.empty(0, np.int64)
    for start in range(0, len(order), window):
        rows = np.concatenate([rest, order[start : start + window]])
        found = [rows[pack] for pack in best_fit(lengths[rows], pack_length)]
        is_last = start + window >= len(order)
        least = min(range(len(found)), key=lambda number: lengths[found[number]].sum())
        rest = np.empty(0, np.int64) if is_last else found.pop(least)
        packs += found
    return packs


def best_fit(lengths: Sequence[int] | np.ndarray, pack_length: int) -> list[list[int]]:
    """Best fit decreasing: the longest row first, each into the fullest pack that still has room for it.

    Rows of equal length keep their order. A row without tokens takes no room.

    Example: lengths (3, 5, 2, 4) into packs of 7 are [[1, 2], [3, 0]]: 5 + 2 and 4 + 3.
    """
    lengths = np.asarray(lengths, np.int64)
    assert not len(lengths) or lengths.max() <= pack_length, "a row is longer than a pack"
    packs: list[list[int]] = []
    # Room and number of each pack in one integer, ascending: the first that is at least a length is the best fit.
    rooms: list[int] = []
    order = np.argsort(-lengths, kind="stable")
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length * _BINS)
        if place == len(rooms):
            room, pack = pack_length, len(packs)
            packs.append([row])
        else:
            room, pack = divmod(rooms.pop(place), _BINS)
            packs[pack].append(row)
        if room > length:
            insort(rooms, (room - length) * _BINS + pack)
    return packs


def split_packs(packs: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Make `count` packs of fewer by halving those with the most rows; empty ones where every pack has one row.

    Example: [a b c], [d] as 3 packs are [a c], [d], [b].
    """
    packs = list(packs)
    by_size = sorted(range(len(packs)), key=lambda number: -len(packs[number]))
    while len(packs) < count:
        halved = []
        for number in by_size[: count - len(packs)]:
            if len(packs[number]) > 1:
                halved.append(packs[number][1::2])
                packs[number] = packs[number][::2]
        if not halved:
            packs += [np.empty(0, np.int64)] * (count - len(packs))
        packs += halved
        by_size = sorted(range(len(packs)), key=lambda number: -len(packs[number]))
    return packs


def _window_rows(lengths: np.ndarray, pack_length: int) -> int:
    """How many rows fill about `WINDOW_PACKS` packs; windows of an epoch are as equal as can be."""
    num_windows = max(1, round(int(lengths.sum()) / (WINDOW_PACKS * pack_length)))
    return max(1, -(-len(lengths) // num_windows))
