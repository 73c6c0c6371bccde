"""Merging around targets at equal distances, against a plain transcription in float64."""

import pytest
import torch

from mllm.pruning.merge import groups_around_even_targets, means, merged_into, targets_plus_means


def transcribed(values, keys, rest: list[int], count: int, *, published: bool):
    """Targets, what becomes of them, and where every other one went: of methods, token by token."""
    step = max(1, len(rest) // count)
    targets = rest[0::step][:count]
    others = [place for place in rest if place not in targets]
    went = {}
    for place in others:
        cosines = [float(keys[place] @ keys[target] / keys[place].norm() / keys[target].norm()) for target in targets]
        went[place] = cosines.index(max(cosines))
    merged = []
    for number, target in enumerate(targets):
        own = [values[place] for place in others if went[place] == number]
        if published:
            merged.append(values[target] + (sum(own) / len(own) if own else 0))
        else:
            merged.append((values[target] + sum(own)) / (1 + len(own)))
    return targets, torch.stack(merged), went


@pytest.mark.parametrize(("num_tokens", "count"), [(20, 3), (20, 7), (20, 11), (5, 4), (9, 1), (4, 4)])
@pytest.mark.parametrize("published", [True, False])
def test_groups_are_those_of_the_published_algorithm(num_tokens, count, published):
    """Also where targets stand at every place, and where a target gets no member."""
    generator = torch.Generator().manual_seed(num_tokens + count)
    values = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    keys = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    rest = torch.randperm(30, generator=generator)[:num_tokens].sort().values
    targets, merged, went = transcribed(values, keys, rest.tolist(), count, published=published)
    groups = groups_around_even_targets(keys, rest, count)
    assert groups.targets.tolist() == targets
    assert dict(zip(groups.members.tolist(), groups.joined.tolist(), strict=True)) == went
    found = (targets_plus_means if published else means)(values, groups)
    torch.testing.assert_close(found, merged, rtol=0, atol=1e-9)


def test_each_token_lives_on_in_one_that_is_kept():
    """Itself, or its target; a token of no group nowhere."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0], [1.0, 0.2], [5.0, 5.0]])
    groups = groups_around_even_targets(keys, torch.tensor([0, 1, 2, 3]), 2)
    assert groups.targets.tolist() == [0, 2]  # every second of the rest
    into = merged_into(torch.tensor([4, 0, 2]), groups, 6)
    assert into.tolist() == [1, 2, 2, 2, 0, -1]


def test_gradients_reach_what_was_merged():
    """Of targets and of their members."""
    values = torch.randn(6, 3, requires_grad=True)
    groups = groups_around_even_targets(torch.randn(6, 2), torch.tensor([1, 2, 3, 5]), 2)
    targets_plus_means(values, groups).sum().backward()
    reached = values.grad.abs().sum(dim=1) > 0
    assert reached.tolist() == [False, True, True, True, False, True]
