"""Scores of tokens by the attention that they receive: tensors in, tensors out."""

import torch

from mllm.shapes import Bool, Float, Int, Tensor

_QUERIES_AT_ONCE = 512


def received(
    queries: Float[Tensor, "H n d"],
    keys: Float[Tensor, "H U d"],
    scaling: float,
    at: Int[Tensor, " n"],
    *,
    both_ways: bool,
) -> Float[Tensor, " n"]:
    """What each of some tokens is paid by all of them: a mean over heads and payers.

    Each payer's attention is a softmax, in float32, over all keys that it sees, of which those of other tokens take
    their share. Causally, a token sees what stands before it: the first of n tokens is paid by n, the last only by
    itself, and so the first wins whatever they hold. Both ways, each sees all up to the last of them, and a score does
    not depend on the place.

    Args:
        queries: Of the tokens.
        keys: Of all tokens of the row, a head for each of the queries'.
        scaling: What scores are multiplied by.
        at: Where among the keys the tokens stand, ascending.
        both_ways: Whether tokens see those behind them, up to the last one.
    """
    keys = keys[:, : int(at[-1]) + 1]
    paid = torch.zeros(len(at), dtype=torch.promote_types(queries.dtype, torch.float32), device=queries.device)
    places = torch.arange(keys.shape[1], device=at.device)
    for some, own in zip(queries.split(_QUERIES_AT_ONCE, dim=1), at.split(_QUERIES_AT_ONCE), strict=True):
        limits = at[-1:].expand_as(own) if both_ways else own
        seen = places <= limits[:, None]
        paid += attention(some, keys, scaling, seen)[..., at].sum(dim=(0, 1))
    return paid / (len(queries) * len(at))


def attention(
    queries: Float[Tensor, "H n d"], keys: Float[Tensor, "H U d"], scaling: float, seen: Bool[Tensor, "n U"]
) -> Float[Tensor, "H n U"]:
    """Softmax over the keys that each query sees, in float32 at least."""
    scores = (queries @ keys.transpose(1, 2)).to(torch.promote_types(queries.dtype, torch.float32)) * scaling
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
