"""Which tokens are in which slots of which layers: against plain lists."""

import pytest
import torch

from mllm.pruning import Selection
from mllm.pruning.prefill import (
    first_stage,
    gathered,
    next_stage,
    num_shared_at_end,
    places_in_segments,
    segments_of,
    slots_left,
    spread,
)

SHOWN = [[0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
"""Which columns are left, of rows padded on either side, and with tokens that have left."""


def test_tokens_that_are_left_stand_at_the_end_in_their_order():
    stage = first_stage(torch.tensor(SHOWN).bool(), torch.tensor([[1, 1], [1, 0], [0, 0]]).bool())
    expected = [[column for column, shown in enumerate(row) if shown] for row in SHOWN]
    found = [columns[is_token].tolist() for columns, is_token in zip(stage.columns, stage.is_token, strict=True)]
    assert found == expected and stage.counts == [5, 5, 2]
    assert all(row.tolist() == sorted(row.tolist()) for row in stage.is_token)  # empty slots first
    assert all(len(set(row.tolist())) == 5 for row in stage.columns)  # each slot its own column
    assert stage.mask.tolist() == [
        [True, True, *[True] * 5], [True, False, *[True] * 5], [False, False, False, False, False, True, True],
    ]  # fmt: skip
    positions = [
        row[row_shown].tolist() for row, row_shown in zip(stage.compacted_positions(), stage.is_token, strict=True)
    ]
    assert positions == [[2, 3, 4, 5, 6], [1, 2, 3, 4, 5], [0, 1]]


def test_the_next_stage_names_its_sources():
    stage = first_stage(torch.tensor(SHOWN).bool(), torch.zeros(3, 0).bool())
    left = [torch.tensor([0, 3, 1]), torch.tensor([4]), torch.tensor([3, 4])]
    new, sources = next_stage(stage, left, stage.past, 7)
    assert [row[shown].tolist() for row, shown in zip(new.columns, new.is_token, strict=True)] == [
        [1, 5, 2],
        [4],
        [5, 6],
    ]
    for row, slots in enumerate(left):
        assert sources[row, 3 - len(slots) :].tolist() == slots.tolist()
    assert all(len(set(row.tolist())) == 3 for row in new.columns)
    assert new.slots(torch.tensor([2, 5, 0]), 0).tolist() == [1, 2]


@pytest.mark.parametrize("is_reordered", [False, True])
def test_slots_left_against_lists(is_reordered):
    """Two items of seven and four tokens among words; each keeps some in an order of its own, and changes them."""
    slots, held = torch.arange(2, 17), [torch.arange(3, 10), torch.arange(11, 15)]
    kept = [torch.tensor([5, 0, 3]), torch.tensor([2, 1])]
    selections = [Selection(own, torch.tensor([[float(place)] for place in own])) for own in kept]
    left, values = slots_left(slots, held, selections, is_reordered=is_reordered)
    items = [[3 + 5, 3, 3 + 3], [11 + 2, 11 + 1]]
    expected = [2, *(items[0] if is_reordered else sorted(items[0])), 10]
    expected += [*(items[1] if is_reordered else sorted(items[1])), 15, 16]
    assert left.tolist() == expected
    starts = (3, 11)
    for (places, value), start in zip(values, starts, strict=True):
        assert [left[place].item() - start for place in places] == value[:, 0].tolist()
    assert slots_left(slots, held, [None, selections[1]], is_reordered=False)[0].tolist()[:9] == list(range(2, 11))


def test_spread_puts_tokens_at_their_columns_and_fills_what_left_from_before():
    hidden = torch.arange(1.0, 9.0).view(2, 4, 1)
    stage = first_stage(torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1]]).bool(), torch.zeros(2, 0).bool())
    found = spread(hidden, stage, 6)[..., 0].tolist()
    assert found == [[0, 2, 2, 3, 4, 4], [5, 6, 6, 6, 7, 8]]


def test_gathered_takes_any_axes():
    index = torch.tensor([[2, 0], [1, 1]])
    for shape, dim in (((2, 3), -1), ((1, 3), -1), ((4, 2, 3), -1), ((2, 3, 5), -2), ((1, 3, 5), -2)):
        values = torch.randn(shape)
        full = values.expand(*(2 if axis == len(shape) + dim - 1 else size for axis, size in enumerate(shape)))
        expected = torch.stack(
            [full.select(dim - 1, row).index_select(dim, index[row]) for row in range(2)], dim=len(shape) + dim - 1
        )
        assert torch.equal(gathered(values, index, dim), expected)


def test_segments_of_a_packed_row_keep_their_tokens_and_count_anew():
    columns = torch.tensor([0, 1, 4, 5, 6, 8])
    segments = segments_of(columns, (4, 3, 2))
    assert segments.tolist() == [0, 0, 1, 1, 1, 2]
    assert places_in_segments(segments).tolist() == [0, 1, 0, 1, 2, 0]


def test_columns_at_the_end_count_only_where_no_row_lacks_one():
    assert num_shared_at_end(torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]).bool()) == 2
    assert num_shared_at_end(torch.tensor([[1, 1, 1, 0]]).bool()) == 0
    assert num_shared_at_end(torch.ones(2, 3).bool()) == 3
