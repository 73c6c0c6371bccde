"""The picture of what a pruner did shows each patch as what it became."""

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.errors import RowError
from mllm.pruning.picture import DROPPED, FRAME, GAP, SIDE, TITLE, draw_stages, fates, view_as_seen
from mllm.pruning.statistics import ItemStages

WHITE = (255, 255, 255)


def stages(num_tokens, kept, merged_into=None):
    return ItemStages(
        num_tokens,
        {layer: torch.tensor(places) for layer, places in kept.items()},
        {layer: torch.tensor(places) for layer, places in (merged_into or {}).items()},
    )


def panels(picture, count):
    """The views that stand side by side, without their titles."""
    width = (picture.width - GAP * (count - 1)) // count
    pixels = np.asarray(picture)[TITLE:]
    return [pixels[:, number * (width + GAP) : number * (width + GAP) + width] for number in range(count)]


def cell(panel, row, column, *, of):
    height, width = panel.shape[0] // of, panel.shape[1] // of
    return panel[row * height : (row + 1) * height, column * width : (column + 1) * width]


def test_tokens_live_on_in_what_those_they_were_merged_into_were_merged_into():
    # 0 and 3 stay; 1 goes into 2, which goes into 3 later on; 4 goes into 5, which is dropped; 6 is dropped at once.
    found = fates(
        stages(
            7,
            {0: [0, 2, 3, 5], 4: [0, 3]},
            {0: [0, 2, 2, 3, 5, 5, -1], 4: [0, -1, 3, 3, -1, -1, -1]},
        )
    )
    assert found[0].tolist() == [0, 2, 2, 3, 5, 5, -1]
    assert found[4].tolist() == [0, 3, 3, 3, -1, -1, -1]


def test_what_nothing_is_merged_into_is_kept_or_dropped():
    assert fates(stages(4, {0: [1, 3], 2: [3]}))[0].tolist() == [-1, 1, -1, 3]
    assert fates(stages(4, {0: [1, 3], 2: [3]}))[2].tolist() == [-1, -1, -1, 3]


def test_kept_patches_look_as_they_do_and_others_do_not():
    image = Image.fromarray(np.random.default_rng(0).integers(60, 250, (SIDE, SIDE, 3), dtype=np.uint8))
    picture = draw_stages([image], stages(9, {0: [0, 4, 8], 1: [4]}, {0: [0, 0, -1, -1, 4, -1, -1, -1, 8]}), (1, 3, 3))
    whole, first, second = panels(picture, 3)
    assert np.array_equal(whole, np.asarray(image))
    assert np.array_equal(cell(first, 2, 2, of=3), cell(whole, 2, 2, of=3))
    framed = cell(first, 0, 0, of=3)
    assert tuple(framed[0, 0]) == FRAME
    assert np.array_equal(framed[20:-20, 20:-20], cell(whole, 0, 0, of=3)[20:-20, 20:-20])
    dropped, merged = cell(first, 0, 2, of=3), cell(first, 0, 1, of=3)
    assert abs(dropped.astype(int) - DROPPED).max() < 45
    assert merged[..., 2].mean() > merged[..., 0].mean() + 50  # tinted
    for row, column in np.ndindex(3, 3):
        is_kept = np.array_equal(cell(second, row, column, of=3), cell(whole, row, column, of=3))
        assert is_kept == ((row, column) == (1, 1))


def test_frames_of_a_video_get_their_own_marks():
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    _, drawn = panels(draw_stages(frames, stages(8, {0: [0, 7]}), (2, 2, 2)), 2)
    left, right = drawn[:, :SIDE], drawn[:, SIDE + 1 :]
    assert tuple(cell(left, 0, 0, of=2)[5, 5]) == (200, 0, 0)
    assert tuple(cell(right, 1, 1, of=2)[5, 5]) == (0, 200, 0)
    assert cell(left, 1, 1, of=2).max() < 60 > cell(right, 0, 0, of=2).max()


@pytest.mark.parametrize(("num_tokens", "grid", "views"), [(9, None, 1), (7, None, 1), (18, (2, 3, 3), 1)])
def test_without_places_patches_are_drawn_in_lines(num_tokens, grid, views):
    picture = draw_stages([Image.new("RGB", (20, 10), WHITE)] * views, stages(num_tokens, {0: [0]}), grid)
    assert picture.height > TITLE


def test_a_grid_of_another_item_is_refused():
    with pytest.raises(RowError, match="2 x 2 x 2 for 9 tokens"):
        draw_stages([Image.new("RGB", (8, 8))], stages(9, {0: [0]}), (2, 2, 2))


def test_a_view_is_shown_as_the_encoder_sees_it():
    image = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = (torch.tensor(image).permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    assert np.array_equal(np.asarray(view_as_seen(pixels, mean, std)), image)
