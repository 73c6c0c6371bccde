"""Grids of unequal size are brought to one by the rule that is stated."""

import pytest
import torch

from mllm.models.grids import align_grid, grid_of_tokens, join_channels


def _grid(side: int, *, width: int = 3, views: int = 2) -> torch.Tensor:
    return torch.randn(views, width, side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64)


def test_patches_stand_in_rows():
    tokens = torch.arange(11.0).view(1, 11, 1)
    grid = grid_of_tokens(tokens, 2)
    assert grid.tolist() == [[[[2.0, 3.0, 4.0], [5.0, 6.0, 7.0], [8.0, 9.0, 10.0]]]]


def test_a_multiple_repeats_every_cell():
    grid = _grid(2)
    found = align_grid(grid, 6)
    for row in range(6):
        for column in range(6):
            assert torch.equal(found[:, :, row, column], grid[:, :, row // 3, column // 3])


def test_any_other_side_is_interpolated_between_centres():
    """Of 2 cells with centres at 0.25 and 0.75 of a side, 3 have theirs at 1/6, 1/2 and 5/6."""
    grid = torch.tensor([[[[0.0, 1.0], [4.0, 5.0]]]], dtype=torch.float64)
    found = align_grid(grid, 3)[0, 0]
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64))


@pytest.mark.parametrize(("own", "side"), [(1, 5), (2, 3), (3, 7), (4, 6), (6, 8), (7, 7)])
def test_what_is_the_same_everywhere_stays_so(own, side):
    grid = torch.full((1, 2, own, own), 0.7, dtype=torch.float64)
    torch.testing.assert_close(align_grid(grid, side), torch.full((1, 2, side, side), 0.7, dtype=torch.float64))


def test_no_change_is_none():
    grid = _grid(4)
    assert align_grid(grid, 4) is grid


def test_cells_have_the_channels_of_all():
    first, second = _grid(4), _grid(2, width=5)
    joined = join_channels([first, second], 4)
    assert joined.shape == (2, 16, 8)
    for cell in range(16):
        row, column = divmod(cell, 4)
        expected = torch.cat([first[:, :, row, column], second[:, :, row // 2, column // 2]], dim=-1)
        assert torch.equal(joined[:, cell], expected)
