"""Packs by hand: each row in the fullest pack that still has room, none longer than it may be."""

from collections import Counter

import numpy as np
import pytest

from mllm.data.packing import WINDOW_PACKS, best_fit, pack_in_windows, split_packs


@pytest.mark.parametrize(
    ("lengths", "pack_length", "packs"),
    [
        ((3, 5, 2, 4), 7, [[1, 2], [3, 0]]),
        # 6 opens, 4 opens, 3 fits beside 6 and beside 4: into the fuller one.
        ((6, 4, 3, 3), 10, [[0, 1], [2, 3]]),
        ((6, 5, 3, 2, 2), 10, [[0, 2], [1, 3, 4]]),
        ((4, 4, 4), 4, [[0], [1], [2]]),
        ((2, 2, 2, 2), 5, [[0, 1], [2, 3]]),
        ((0, 5, 0), 5, [[1], [0, 2]]),
        ((), 5, []),
    ],
)
def test_best_fit_by_hand(lengths, pack_length, packs):
    assert best_fit(lengths, pack_length) == packs


def test_a_row_longer_than_a_pack_is_none_of_ours():
    with pytest.raises(AssertionError):
        best_fit([3, 8], 7)


def test_packs_of_many_windows_hold_every_row_once_and_are_full():
    random = np.random.default_rng(3)
    lengths = random.integers(5, 400, 20_000)
    order = random.permutation(20_000)
    packs = pack_in_windows(order, lengths, 1000)
    assert sorted(np.concatenate(packs)) == list(range(20_000))
    assert max(lengths[pack].sum() for pack in packs) <= 1000
    assert len(packs) * 1000 < 1.005 * lengths.sum()
    # In the order of the epoch: early packs hold what comes early.
    place = np.argsort(order)
    assert np.corrcoef(np.arange(len(packs)), [place[pack].mean() for pack in packs])[0, 1] > 0.99


def test_a_window_leaves_its_least_filled_pack_to_the_next():
    """Four windows of rows that fill ten to a pack, each with some over: only the last has a pack that is not full."""
    num_rows = 4 * (10 * WINDOW_PACKS + 3)
    packs = pack_in_windows(np.arange(num_rows), np.full(num_rows, 10), 100)
    assert Counter(map(len, packs)) == {10: num_rows // 10, num_rows % 10: 1}
    assert sorted(np.concatenate(packs)) == list(range(num_rows))


def test_packs_are_halved_to_a_number_of_them():
    packs = [np.array([1, 2, 3]), np.array([4])]
    assert _plain(split_packs(packs, 3)) == [[1, 3], [4], [2]]
    assert _plain(split_packs(packs, 4)) == [[1], [4], [2], [3]]
    assert _plain(split_packs(packs, 6)) == [[1], [4], [2], [3], [], []]
    assert _plain(split_packs(packs, 2)) == [[1, 2, 3], [4]]
    assert _plain(packs) == [[1, 2, 3], [4]]


def _plain(packs):
    return [pack.tolist() for pack in packs]
