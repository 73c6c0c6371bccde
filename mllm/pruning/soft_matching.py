"""Complete-graph soft matching and weighted ensembles: which tokens become one, and what they become.

CrossGET (arXiv 2305.17455, section 3, and its published code). Every pair of tokens is a candidate, where ToMe knows
only pairs of an even and an odd one; what leaves is unimportant and has a double; and what it is worth in its
double's new value depends on how important both are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mllm.shapes import Bool, Float, Int, Tensor


class Matching(NamedTuple):
    """Which tokens of each sequence leave, and into which they go.

    Args:
        sources: Places of those that leave, the first to go first; as many as the longest has.
        targets: Where each lives on: a place that stays.
        is_source: False where a sequence has fewer, and `sources` and `targets` name anything.
    """

    sources: Int[Tensor, "B r"]
    targets: Int[Tensor, "B r"]
    is_source: Bool[Tensor, "B r"]


@torch.no_grad()
def match_tokens(
    metric: Float[Tensor, "B T d"],
    importance: Float[Tensor, "B T"],
    is_candidate: Bool[Tensor, "B T"],
    counts: Sequence[int],
) -> Matching:
    """Choose which tokens leave.

    Tokens are ranked by their greatest similarity to another. Each is then compared with those behind it alone, so
    that of two that resemble one another the first is redundant and the second is not. Those whose importance exceeds
    their redundancy least leave, each for the most similar of those that stay.

    Args:
        metric: What similarity is the cosine of.
        importance: Of each token.
        is_candidate: False for tokens that neither leave nor take others in.
        counts: How many leave of each sequence, fewer than its candidates.
    """
    metric = metric.to(torch.promote_types(metric.dtype, torch.float32))
    directions = metric / metric.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(metric.dtype).tiny)
    similarity = directions @ directions.transpose(1, 2)
    # To the last bit alike in both directions: two that are each other's nearest are then ranked by their places.
    similarity = (similarity + similarity.transpose(1, 2)) / 2
    is_pair = is_candidate[:, :, None] & is_candidate[:, None, :]
    is_pair &= ~torch.eye(metric.shape[1], dtype=torch.bool, device=metric.device)
    similarity = similarity.masked_fill(~is_pair, float("-inf"))
    rank = _ranks(-similarity.amax(dim=-1))
    is_behind = rank[:, None, :] > rank[:, :, None]
    redundancy = similarity.masked_fill(~is_behind, float("-inf")).amax(dim=-1)
    order = (importance.to(metric.dtype) - redundancy).argsort(dim=-1, stable=True)
    sources = order[:, : max(counts)]
    number = torch.tensor(counts, device=metric.device)
    is_source = torch.arange(sources.shape[1], device=metric.device) < number[:, None]
    leaves = torch.zeros_like(is_candidate).scatter(1, sources, is_source)
    to_target = similarity.masked_fill(leaves[:, None, :], float("-inf"))
    targets = to_target.argmax(dim=-1).gather(1, sources)
    return Matching(sources, targets, is_source)


def ensemble(
    values: Float[Tensor, "B T D"],
    sizes: Float[Tensor, "B T"],
    importance: Float[Tensor, "B T"],
    matching: Matching,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T"]]:
    """What tokens are, and how many each stands for, when those that leave have gone into others.

    A pair shares a weight of two by the softmax of what both are worth: of equal importance it becomes the mean over
    all tokens that it stands for. Of sources with one target each adds its own share, and changes the target's by its
    own pair.

    Args:
        values: Of the tokens.
        sizes: How many tokens each stands for.
        importance: Of each, by which a pair's weights are made; gradients pass.
        matching: Which go where.

    Returns:
        At the places as they were; what stands at places of sources is no more.
    """
    sources, targets, is_source = matching
    share = 2 * torch.sigmoid(importance.gather(1, sources) - importance.gather(1, targets)).to(sizes.dtype)
    none = torch.zeros_like(share)
    own_sizes = torch.where(is_source, sizes.gather(1, sources), none)
    at_targets = targets[..., None].expand(*targets.shape, values.shape[-1])
    at_sources = sources[..., None].expand_as(at_targets)
    incoming = (share * own_sizes)[..., None] * values.gather(1, at_sources)
    kept_share = torch.ones_like(sizes).scatter_add(1, targets, torch.where(is_source, 1 - share, none))
    merged = ((sizes * kept_share)[..., None] * values).scatter_add(1, at_targets, incoming)
    new_sizes = sizes.scatter_add(1, targets, own_sizes)
    merged = (merged / new_sizes[..., None]).to(values.dtype)
    # What takes nothing in stays as it is, to the last bit.
    return torch.where(_named(targets, is_source, sizes)[..., None], merged, values), new_sizes


def _named(places: Int[Tensor, "B r"], counts: Bool[Tensor, "B r"], like: Float[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Which places are named by one that counts."""
    return torch.zeros_like(like).scatter_add(1, places, counts.to(like.dtype)) > 0


def _ranks(values: Float[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The place of each value in ascending order; of equal values the first comes first."""
    order = values.argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)
