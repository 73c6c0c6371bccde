"""Schedules: how many tokens each layer sees, from the average alone."""

import pytest

from mllm.pruning.schedules import geometric, lengths_of, merged_share, per_layer, starts_of, whole


@pytest.mark.parametrize(
    ("average", "most", "published"),
    [
        (32, 576, [48, 35, 26, 19]),  # the only schedule that the authors published
        (64, 576, [96, 70, 52, 38]),
        (128, 576, [192, 141, 103, 76]),
        (192, 576, [288, 211, 155, 114]),
        (160, 2880, [240, 176, 129, 95]),
        (320, 2880, [480, 352, 258, 190]),
        (640, 2880, [960, 704, 517, 379]),
    ],
)
def test_the_published_schedules_come_out(average, most, published):
    """Of 32 layers, cut at 8, 16 and 24."""
    starts = starts_of(32, 4)
    assert starts == [0, 8, 16, 24]
    assert geometric(average, lengths_of(starts, 32), first=1.5, most=most) == published


def test_an_eighth_is_the_published_share_of_merged_tokens():
    """42 + 6, 30 + 5, 22 + 4 and 16 + 3."""
    assert [merged_share(count, 0.125) for count in (48, 35, 26, 19)] == [6, 5, 4, 3]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.125, 0.5, 0.99])
def test_merged_tokens_are_never_all(share):
    """One token at least is there for its own sake."""
    shares = [merged_share(count, share) for count in range(1, 100)]
    assert all(0 <= merged < count for count, merged in enumerate(shares, start=1))
    assert merged_share(30, 0.1) == 3  # although 30 x 0.1 is above 3 in binary


@pytest.mark.parametrize(
    ("num_layers", "starts"),
    [
        (1, [0]),
        (2, [0, 1]),
        (3, [0, 1, 2]),
        (4, [0, 1, 2, 3]),
        (5, [0, 1, 3, 4]),
        (6, [0, 2, 3, 5]),
        (28, [0, 7, 14, 21]),
    ],
)
def test_stretches_are_equal_as_far_as_layers_allow(num_layers, starts):
    """Fewer than four layers are a stretch each."""
    assert starts_of(num_layers, 4) == starts


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 6, 7, 24, 28, 30, 32, 36])
@pytest.mark.parametrize("most", [2, 9, 49, 576])
@pytest.mark.parametrize("first", [1.0, 1.5, 3.0])
def test_layers_see_the_average_and_never_more(num_layers, most, first):
    """For every depth: falling numbers, from one to all there are, whose mean is the budget less a fraction."""
    lengths = lengths_of(starts_of(num_layers, 4), num_layers)
    for average in range(1, most + 1, max(1, most // 12)):
        counts = geometric(average, lengths, first=first, most=most)
        total = sum(per_layer(counts, lengths))
        assert len(per_layer(counts, lengths)) == num_layers
        assert counts == sorted(counts, reverse=True)
        assert most >= counts[0] >= counts[-1] >= 1
        assert average * num_layers - max(lengths) < total <= average * num_layers


def test_one_layer_sees_the_average():
    """It has no place behind it at which to make up for more."""
    assert geometric(7, [1], first=1.5, most=9) == [7]


def test_a_budget_of_all_tokens_drops_none():
    """However the first stretch is to be larger than the average."""
    assert geometric(9, [1, 1, 1, 1], first=1.5, most=9) == [9, 9, 9, 9]


def test_fractions_go_to_the_largest_first():
    """And none beyond the total; where one token a layer is too much already, one it is."""
    assert whole([3.2, 2.9, 1.5], [1, 1, 1], 7) == [3, 3, 1]
    assert whole([3.2, 2.9, 1.5], [1, 1, 2], 8) == [3, 3, 1]
    assert whole([5.0, 0.1, 0.1], [1, 1, 1], 5) == [3, 1, 1]
    assert whole([9.0, 2.3, 0.6, 0.1], [1, 1, 1, 1], 12) == [9, 1, 1, 1]
    assert whole([1.0, 0.5], [1, 1], 1) == [1, 1]
