"""What an epoch holds, and in which order."""

from collections import Counter

import pytest

from mllm.data.order import EpochOrder, every_row_once, largest_remainder, weighted_order
from mllm.errors import OptionError


def test_the_same_epoch_and_seed_give_the_same_order_and_others_another():
    order = weighted_order([7, 20, 5], [1.0, 2.0, None])
    assert order(3, 11).tolist() == order(3, 11).tolist()
    assert order(3, 11).tolist() != order(4, 11).tolist() != order(3, 12).tolist()


def test_without_weights_every_row_once_an_epoch():
    order = weighted_order([4, 0, 9], [None, None, None])
    assert order == every_row_once(4, 0, 9)
    for epoch in range(3):
        assert sorted(order(epoch, 0).tolist()) == list(range(13))


def test_an_epoch_has_the_stated_share_of_each_source():
    order = weighted_order([10, 100, 7], [3.0, 1.0, None], epoch_rows=47)
    assert len(order) == 47 and order.counts == (30, 10, 7)
    drawn = [sum(start <= position < end for position in order(0, 0).tolist())
             for start, end in ((0, 10), (10, 110), (110, 117))]  # fmt: skip
    assert drawn == [30, 10, 7]


@pytest.mark.parametrize(("size", "count"), [(10, 3), (10, 7), (4, 9), (1, 3)])
def test_no_row_comes_again_before_every_other_row_has_come(size, count):
    order = EpochOrder((size, 2), (count, 2))
    seen: Counter[int] = Counter()
    for epoch in range(20):
        positions = [position for position in order(epoch, 5).tolist() if position < size]
        assert len(positions) == count
        seen.update(positions)
        assert max(seen.values()) - min(seen[row] for row in range(size)) <= 1
    assert sum(seen.values()) == 20 * count


def test_a_temperature_goes_from_proportional_to_equal():
    assert weighted_order([100, 400], [None, None], temperature=1.0).counts == (100, 400)
    assert weighted_order([100, 400], [None, None], temperature=2.0, epoch_rows=300).counts == (100, 200)
    assert weighted_order([100, 400], [None, None], temperature=1e9).counts == (250, 250)


def test_a_stated_length_alone_goes_through_the_sources_as_they_are():
    order = weighted_order([10, 30], [None, None], epoch_rows=20)
    assert order.counts == (5, 15)
    halves = [order(epoch, 0).tolist() for epoch in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(40))


def test_a_source_without_rows_gets_no_share():
    assert weighted_order([0, 10], [5.0, 1.0]).counts == (0, 10)


@pytest.mark.parametrize("total", [0, 1, 7, 100, 101])
def test_largest_remainder_is_never_more_than_one_off(total):
    shares = [0.5, 3.0, 1.0, 1.0, 0.0]
    counts = largest_remainder(shares, total)
    assert sum(counts) == total and counts[-1] == 0
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - total * share / sum(shares)) < 1
    assert largest_remainder([1.0, 1.0, 1.0], 8) == [3, 3, 2]


def test_what_contradicts_itself_is_refused():
    with pytest.raises(OptionError, match="temperature = 2.0, and a source with a weight"):
        weighted_order([1, 2], [1.0, None], temperature=2.0)
    with pytest.raises(OptionError, match="epoch_rows = 3, and 4 rows of sources without a weight"):
        weighted_order([4, 2], [None, 1.0], epoch_rows=3)
