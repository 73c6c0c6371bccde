"""The statistics of a pruner say what became of each token of each picture, by its place in the picture."""

from dataclasses import dataclass

import pytest
import torch

from mllm.pruning import Cut, Item, Pruner, Row, Selection
from mllm.pruning.notes import selections_of_rows
from mllm.testing_pruning import NUM_TOKENS, answered, pictures_and_words, tiny_prunable_model


@dataclass
class Backwards(Pruner):
    """In front of the model: 15, 13, 11, ..., in this order, each with its left neighbour merged into it.

    At the cut, of what is there: the first, third and fifth in the opposite order, the second merged into the first.
    """

    def cuts(self, num_layers: int) -> tuple[Cut, ...]:
        return (Cut(2, 2),)

    def select(self, item: Item, num_layers: int) -> Selection:
        kept = torch.arange(15, -1, -2)
        into = torch.arange(7, -1, -1).repeat_interleave(2)
        return Selection(kept, item.vectors[kept] + item.vectors[kept - 1], into)

    def select_at_cut(self, row: Row, cut: int, entered: tuple[int, ...], num_layers: int) -> list[Selection]:
        into = torch.tensor([2, 2, 1, -1, 0, -1, -1, -1])
        return [Selection(torch.tensor([4, 2, 0]), row.hidden[item[[4, 2, 0]]], into) for item in row.items]


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    return tiny_prunable_model(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("positions", ["original", "compacted"])
def test_every_token_is_accounted_for(composed, positions, num_beams):
    model = composed[0]
    with Backwards(positions=positions)(model) as pruner:
        answered(model, pictures_and_words(model), num_beams=num_beams, output_logits=False)
    # In their original positions the eight stand as 1, 3, ..., 15; compacted as 15, 13, ..., 1.
    there = list(range(1, 16, 2)) if positions == "original" else list(range(15, 0, -2))
    rows = pruner.statistics.items
    assert [len(row) for row in rows] == [number for number in (1, 2, 0) for _ in range(num_beams)]
    for item in (item for row in rows for item in row):
        assert item.num_tokens == NUM_TOKENS
        assert item.kept[0].tolist() == list(range(1, 16, 2))
        assert item.merged_into[0].tolist() == [place | 1 for place in range(16)]
        assert item.kept[2].tolist() == sorted([there[0], there[2], there[4]])
        into = {there[0]: there[0], there[1]: there[0], there[2]: there[2], there[4]: there[4]}
        assert item.merged_into[2].tolist() == [into.get(place, -1) for place in range(16)]


def test_selections_are_found_again_where_rows_are_repeated():
    image, video = [Selection(torch.tensor([number])) for number in range(3)], [None]
    kinds = [["image", "video"], [], ["image", "image"]]
    selections = {"image": image, "video": video}
    expected = [[image[0], None], [], image[1:]]
    assert selections_of_rows(kinds, selections) == expected
    repeated = [row for row in kinds for _ in range(2)]
    assert selections_of_rows(repeated, selections) == [row for row in expected for _ in range(2)]
    for others in ([["image"]], [["image"] * 3, ["image"]], kinds[:2]):
        assert selections_of_rows(others, selections) == [[None] * len(row) for row in others]
