"""The training loss of supervised tokens. Pure."""

import torch
from torch import nn
from torch.nn import functional

from mllm.shapes import Float, Int, Tensor, TokenIds

IGNORED = -100


def supervised_loss(
    hidden: Float[Tensor, "B T D"],
    labels: TokenIds,
    head: nn.Module,
    *,
    loss_weights: Float[Tensor, "B T"] | None = None,
    num_items: Int[Tensor, ""] | Float[Tensor, ""] | int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the next token at supervised positions, summed and divided by `num_items`.

    Only the hidden states in front of a label other than -100 reach the head, so no [B, T, vocabulary] tensor is ever
    made. Without `num_items` the divisor is the batch's own number of supervised tokens (at least 1): then the result
    is their mean. A trainer that accumulates passes the count of the whole global batch instead.

    Args:
        hidden: Last hidden states.
        labels: Token ids, -100 where nothing is learned; aligned with the input (the shift happens here).
        head: The language model's head.
        loss_weights: A factor per label, 1 where absent.
        num_items: What the sum is divided by.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    logits = head(hidden[:, :-1][supervised]).float()
    losses = functional.cross_entropy(logits, targets[supervised], reduction="none")
    if loss_weights is not None:
        losses = losses * loss_weights[:, 1:][supervised]
    if num_items is None:
        num_items = max(1, losses.numel())
    return losses.sum() / torch.as_tensor(num_items, device=losses.device, dtype=losses.dtype)
