"""ToMe's matching and merging against a transcription of the paper, and what they keep to."""

import pytest
import torch

from mllm.errors import OptionError
from mllm.pruning import Item, ToMe


def merged_as_published(vectors: torch.Tensor, wanted: int, share: float) -> list[tuple[torch.Tensor, list[int]]]:
    """In float64: of each token that is left its value, and all tokens that went into it, its own place first."""
    tokens = [(value, [place]) for place, value in enumerate(vectors.double())]
    while len(tokens) > wanted:
        leaving = min(max(int(share * len(tokens)), 1), len(tokens) - wanted)
        # 1. and 2.: two sets, alternately; an edge from each of A to its most similar of B.
        edges = []
        for a in range(0, len(tokens), 2):
            similarity = {
                b: float(torch.cosine_similarity(tokens[a][0], tokens[b][0], dim=0)) for b in range(1, len(tokens), 2)
            }
            b = max(similarity, key=similarity.__getitem__)
            edges.append((similarity[b], a, b))
        # 3. and 4.: the most similar edges are merged, by the mean of all tokens that are in either.
        edges = sorted(edges, reverse=True)[:leaving]
        members = {b: [b, *(a for _, a, other in edges if other == b)] for _, _, b in edges}
        gone = {a for _, a, _ in edges}
        after = []
        for place, token in enumerate(tokens):
            if place in gone:
                continue
            group = [tokens[member] for member in members.get(place, [place])]
            sizes = [len(inside) for _, inside in group]
            value = sum(size * value for size, (value, _) in zip(sizes, group, strict=True)) / sum(sizes)
            after.append((value, token[1] + [one for _, inside in group[1:] for one in inside]))
        tokens = after
    return tokens


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("wanted", "share"), [(1, 0.5), (6, 0.5), (15, 0.5), (20, 0.5), (6, 0.1), (25, 0.5)])
def test_tokens_merge_as_published(seed: int, wanted: int, share: float):
    vectors = torch.randn(25, 8, generator=torch.Generator().manual_seed(seed))
    selection = ToMe(tokens=wanted, merged_at_once=share).select(Item("image", vectors, None, None), 2)
    expected = merged_as_published(vectors, wanted, share)
    assert selection.kept.tolist() == [inside[0] for _, inside in expected]
    torch.testing.assert_close(selection.values.double(), torch.stack([value for value, _ in expected]))
    lives_in = {one: number for number, (_, inside) in enumerate(expected) for one in inside}
    assert selection.merged_into.tolist() == [lives_in[place] for place in range(25)]


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_each_token_is_the_mean_of_what_went_into_it(share: float):
    vectors = torch.randn(50, 6)
    selection = ToMe(tokens=7, merged_at_once=share).select(Item("video", vectors, None, None), 2)
    means = torch.stack([vectors[selection.merged_into == number].mean(dim=0) for number in range(7)])
    torch.testing.assert_close(selection.values, means)
    assert selection.merged_into[selection.kept].tolist() == list(range(7))


def test_with_room_for_all_nothing_changes():
    vectors = torch.randn(9, 4).bfloat16()
    selection = ToMe(tokens=9).select(Item("image", vectors, None, None), 2)
    assert selection.kept.tolist() == list(range(9))
    assert torch.equal(selection.values.bfloat16(), vectors)


def test_gradients_reach_all_tokens_in_equal_parts():
    vectors = torch.randn(8, 4, requires_grad=True)
    selection = ToMe(tokens=3).select(Item("image", vectors, None, None), 2)
    selection.values.sum().backward()
    sizes = selection.merged_into.bincount()[selection.merged_into]
    torch.testing.assert_close(vectors.grad, (1 / sizes)[:, None].expand(8, 4))


@pytest.mark.parametrize("share", [0.0, 0.6, -1.0])
def test_a_round_merges_half_at_most(share: float):
    with pytest.raises(OptionError, match="merged_at_once"):
        ToMe(merged_at_once=share)
