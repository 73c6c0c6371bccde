"""Merging of tokens that would leave into others: tensors in, tensors out.

Which token goes where is decided in one function, and applied, to any values of the tokens, in others.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from mllm.shapes import Float, Int, Tensor


@dataclass(frozen=True)
class Groups:
    """Tokens that others are merged into.

    Args:
        targets: Their places.
        members: Places of the tokens that are merged into them.
        joined: Which of the targets each of the members goes to.
    """

    targets: Int[Tensor, " c"]
    members: Int[Tensor, " m"]
    joined: Int[Tensor, " m"]


def groups_around_even_targets(keys: Float[Tensor, "V d"], rest: Int[Tensor, " r"], count: int) -> Groups:
    """Groups around targets at equal distances; every other token joins the target whose key has the highest cosine.

    Args:
        keys: Of all tokens.
        rest: Places of the tokens to be grouped, in their order.
        count: How many targets, from 1 to as many as there are tokens.
    """
    is_target = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
    is_target[:: max(1, len(rest) // count)] = True
    is_target &= is_target.cumsum(0) <= count
    targets, members = rest[is_target], rest[~is_target]
    directions = functional.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    return Groups(targets, members, (directions[members] @ directions[targets].T).argmax(dim=1))


def targets_plus_means(values: Float[Tensor, "V D"], groups: Groups) -> Float[Tensor, "c D"]:
    """To each target's value the mean of its members' is added: as published for VisionZip and VisionDrop.

    A target without members stays as it is; others come out about twice as long as a token is.
    """
    sums, sizes = _sums(values, groups)
    return values[groups.targets] + sums / sizes.clamp(min=1)


def means(values: Float[Tensor, "V D"], groups: Groups) -> Float[Tensor, "c D"]:
    """The mean of each target with its members."""
    sums, sizes = _sums(values, groups)
    return (values[groups.targets] + sums) / (1 + sizes)


def merged_into(kept: Int[Tensor, " n"], groups: Groups, num_tokens: int) -> Int[Tensor, " V"]:
    """Of each token, which of the kept ones it lives on in: itself, or its target; -1 for none.

    Args:
        kept: Places of the tokens that stay, the targets the last of them.
        groups: Merged into those.
        num_tokens: Of all.
    """
    into = torch.full((num_tokens,), -1, dtype=torch.long, device=kept.device)
    into[kept] = torch.arange(len(kept), device=kept.device)
    into[groups.members] = groups.joined + (len(kept) - len(groups.targets))
    return into


def _sums(values: Float[Tensor, "V D"], groups: Groups) -> tuple[Float[Tensor, "c D"], Float[Tensor, "c 1"]]:
    """Of the members of each group: their sum, and how many they are."""
    # A product, not an `index_add`, whose order of summation on a GPU is another at each run.
    is_of = functional.one_hot(groups.joined, len(groups.targets)).T.to(values.dtype)
    return is_of @ values[groups.members], is_of.sum(dim=1, keepdim=True)
