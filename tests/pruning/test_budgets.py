"""How a number of tokens is dealt out: exact in sum, as even or as proportional as whole numbers allow."""

import random

import pytest
import torch

from mllm.pruning import Item, Uniform
from mllm.pruning.budgets import apportioned, evenly, evenly_on_grid

GRIDS = [(1, 3, 3), (1, 4, 6), (1, 2, 9), (3, 2, 5), (8, 4, 4), (5, 1, 1), (1, 1, 7), (2, 7, 1)]


@pytest.mark.parametrize("num_tokens", [1, 9, 24, 2880])
def test_each_equal_stretch_has_one_place_in_its_middle(num_tokens: int):
    for count in {1, 2, 5, num_tokens // 3, num_tokens - 1, num_tokens} - {0}:
        if count > num_tokens:
            continue
        for number, place in enumerate(evenly(num_tokens, count).tolist()):
            assert place <= (number + 0.5) * num_tokens / count < place + 1


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_gives_as_many_different_places_as_asked_for(grid: tuple[int, int, int]):
    num_places = grid[0] * grid[1] * grid[2]
    for count in range(1, num_places + 1):
        places = evenly_on_grid(grid, count)
        assert len(places) == count == len(set(places.tolist()))
        assert torch.equal(places, places.sort().values)
        assert set(places.tolist()) <= set(range(num_places))


@pytest.mark.parametrize("grid", GRIDS)
def test_views_differ_by_one_at_most(grid: tuple[int, int, int]):
    num_views, num_rows, num_columns = grid
    for count in range(num_views, num_views * num_rows * num_columns + 1):
        of_views = (evenly_on_grid(grid, count) // (num_rows * num_columns)).bincount(minlength=num_views)
        assert of_views.max() - of_views.min() <= 1


@pytest.mark.parametrize(("side", "kept"), [(24, 8), (24, 6), (9, 3)])
def test_a_square_number_of_a_square_grid_is_a_square_grid(side: int, kept: int):
    places = evenly_on_grid((1, side, side), kept * kept)
    rows, columns = places // side, places % side
    assert torch.equal(rows.unique(), columns.unique())
    assert len(rows.unique()) == kept
    assert len(rows.unique().diff().unique()) == 1  # equal distances


def test_a_wide_grid_gets_more_columns_than_rows():
    places = evenly_on_grid((1, 4, 16), 4)
    assert len((places // 16).unique()) == 1
    assert len((places % 16).unique()) == 4


def test_uniform_uses_the_grid_where_there_is_one():
    vectors = torch.zeros(24 * 24, 2)
    pruner = Uniform(tokens=64)
    on_grid = pruner.select(Item("image", vectors, None, (1, 24, 24)), 2)
    in_sequence = pruner.select(Item("image", vectors, None, None), 2)
    assert on_grid.kept.tolist() == evenly_on_grid((1, 24, 24), 64).tolist()
    assert in_sequence.kept.tolist() == evenly(24 * 24, 64).tolist()


def test_what_is_dealt_out_is_all_of_it_and_no_more_than_there_is_room_for():
    chance = random.Random(0)
    for _ in range(2000):
        num = chance.randint(1, 6)
        room = [chance.randint(0, 9) for _ in range(num)]
        weights = [chance.choice([0, 0, 1, 3, 7.5]) for _ in range(num)]
        total = chance.randint(0, sum(room))
        given = apportioned(total, weights, room)
        assert sum(given) == total
        assert all(0 <= one <= most for one, most in zip(given, room, strict=True))


def test_with_room_enough_shares_are_proportional_up_to_rounding():
    chance = random.Random(0)
    for _ in range(500):
        weights = [chance.random() for _ in range(chance.randint(1, 6))]
        total = chance.randint(0, 50)
        for one, weight in zip(apportioned(total, weights, [50] * len(weights)), weights, strict=True):
            assert abs(one - total * weight / sum(weights)) < 1


def test_what_has_no_room_goes_to_others_by_their_weights():
    assert apportioned(12, [9, 2, 1], [3, 20, 20]) == [3, 6, 3]
    assert apportioned(7, [1, 0, 0], [3, 9, 9]) == [3, 2, 2]  # no weight is left: evenly
    assert apportioned(7, [1, 1, 1], [9, 9, 9]) == [3, 2, 2]  # of equal remainders the first


def test_what_is_left_of_whole_parts_goes_to_the_largest_remainders():
    assert apportioned(10, [1.1, 5.6, 3.3], [10, 10, 10]) == [1, 6, 3]
    assert apportioned(10, [2.4, 2.3, 5.3], [10, 10, 10]) == [3, 2, 5]
