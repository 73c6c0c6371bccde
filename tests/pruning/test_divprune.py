"""DivPrune's choices against a transcription of its max-min rule, and what they keep to."""

import math

import pytest
import torch

from mllm.pruning import DivPrune, Item


def chosen_as_published(vectors: torch.Tensor, count: int) -> list[int]:
    """In float64, token by token: the farthest nearest neighbour first, then the farthest from all chosen."""
    points = vectors.double().tolist()

    def distance(one: int, other: int) -> float:
        a, b = points[one], points[other]
        return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    everything = range(len(points))
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [one for one in everything if one not in chosen]
        if chosen:
            nearest = {one: min(distance(one, other) for other in chosen) for one in rest}
        else:
            nearest = {one: min(distance(one, other) for other in everything if other != one) for one in rest}
        chosen.append(max(rest, key=nearest.__getitem__))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 2, 7, 23, 24])
def test_choices_are_the_published_ones(seed: int, count: int):
    vectors = torch.randn(24, 8, generator=torch.Generator().manual_seed(seed))
    selection = DivPrune(tokens=count).select(Item("image", vectors, None, None), 2)
    assert selection.kept.tolist() == chosen_as_published(vectors, count)
    assert selection.values is None


def test_lengths_of_vectors_do_not_matter():
    vectors = torch.randn(30, 8)
    scaled = vectors * torch.rand(30, 1).add(0.1)
    kept = [DivPrune(tokens=9).select(Item("image", one, None, None), 2).kept.tolist() for one in (vectors, scaled)]
    assert kept[0] == kept[1]


def test_each_of_a_few_directions_is_kept_once():
    directions = torch.eye(5, 8)
    vectors = directions.repeat_interleave(6, dim=0)[torch.randperm(30)] + 1e-3 * torch.randn(30, 8)
    kept = DivPrune(tokens=5).select(Item("image", vectors, None, None), 2).kept
    assert sorted(vectors[kept].argmax(dim=1).tolist()) == [0, 1, 2, 3, 4]


def test_of_equal_vectors_none_is_chosen_twice():
    kept = DivPrune(tokens=5).select(Item("image", torch.ones(7, 4), None, None), 2).kept.tolist()
    assert len(set(kept)) == 5


def test_vectors_of_half_precision_are_compared_in_full():
    vectors = torch.randn(40, 8).bfloat16()
    kept = DivPrune(tokens=11).select(Item("image", vectors, None, None), 2).kept.tolist()
    assert kept == chosen_as_published(vectors, 11)
