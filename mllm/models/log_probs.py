"""Log-probabilities of supervised tokens, to go backward from: what preference losses are made of. Pure.

As in `mllm.models.loss` only the states in front of supervised tokens reach the head, a chunk of them at a time. What
a loss makes of the log-probabilities is known only when all of them are, so the gradient of each is kept, a vector of
the model's width, and weighed on the way back. Only where the head itself is trained are its logits computed again.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mllm.models.loss import (
    IGNORED,
    PLAIN_LOGITS,
    LogitExtras,
    as_forward,
    chunk_rows,
    compute_dtype,
    cross_entropy_,
    require_linear,
)
from mllm.shapes import Bool, Float, Int, Tensor, TokenIds


def supervised_log_probs(
    hidden: Float[Tensor, "B T D"],
    labels: TokenIds,
    head: nn.Module,
    *,
    own_tokens: Bool[Tensor, "B T"] | None = None,
    extras: LogitExtras = PLAIN_LOGITS,
) -> Float[Tensor, " S"]:
    """The log-probability of each supervised token, row by row, in float32 (float64 of a model in float64).

    Args:
        hidden: Last hidden states.
        labels: Token ids, -100 where none is asked for; aligned with the input (the shift happens here).
        head: The language model's head, a linear layer; called once.
        own_tokens: Labels in place of which the model's likeliest other token is asked for. Only Re-Align's released
            trainer needs that, see `mllm.training.preference_loss`.
        extras: What the head does to its logits.

    Raises:
        OptionError: The head is no plain linear layer, such as a quantised one.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    own = None if own_tokens is None else own_tokens[:, 1:][supervised]
    with as_forward(head, partial(_log_probs_of, head)):
        return head(hidden[:, :-1][supervised], targets[supervised], own, extras)


def _log_probs_of(
    head: nn.Module,
    hidden: Float[Tensor, "S D"],
    targets: Int[Tensor, " S"],
    own: Bool[Tensor, " S"] | None,
    extras: LogitExtras,
) -> Float[Tensor, " S"]:
    require_linear(head)
    return _TokenLogProbs.apply(hidden, head.weight, head.bias, targets, own, extras, torch.is_grad_enabled())


class _TokenLogProbs(torch.autograd.Function):
    """Linear layer, extras and log-softmax in one, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "S D"],
        weight: Float[Tensor, "vocabulary D"],
        bias: Float[Tensor, " vocabulary"] | None,
        targets: Int[Tensor, " S"],
        own: Bool[Tensor, " S"] | None,
        extras: LogitExtras,
        has_graph: bool,
    ) -> Float[Tensor, " S"]:
        wants_hidden, wants_weight = (*ctx.needs_input_grad[:2],) if has_graph else (False, False)
        gradient = torch.empty_like(hidden) if wants_hidden else None
        losses = torch.empty(len(hidden), dtype=_exact(weight), device=hidden.device)
        targets = targets.clone() if own is not None else targets
        for chunk, logits, matrix in _chunks_of_logits(hidden, weight, bias):
            if own is not None:
                targets[chunk] = torch.where(own[chunk], _likeliest_other(logits, targets[chunk]), targets[chunk])
            losses[chunk] = cross_entropy_(logits, targets[chunk], None, extras, has_grad=wants_hidden)
            if gradient is not None:
                gradient[chunk] = logits.to(matrix.dtype) @ matrix
        ctx.extras, ctx.wants_weight = extras, wants_weight
        ctx.save_for_backward(gradient, targets, *((hidden, weight, bias) if wants_weight else ()))
        return -losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " S"]) -> tuple[Tensor | None, ...]:
        # The kept gradients are those of losses, which are negative log-probabilities.
        gradient, targets, *(hidden, weight, bias) = (*ctx.saved_tensors, None, None, None)[:5]
        of_hidden = None if gradient is None else gradient * -grad.unsqueeze(-1).to(gradient.dtype)
        of_weight = of_bias = None
        if ctx.wants_weight:
            of_weight, of_bias = _head_gradients(hidden, weight, bias, targets, -grad, ctx.extras)
        return of_hidden, of_weight, of_bias, None, None, None, None


def _head_gradients(
    hidden: Float[Tensor, "S D"],
    weight: Float[Tensor, "vocabulary D"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " S"],
    factors: Float[Tensor, " S"],
    extras: LogitExtras,
) -> tuple[Tensor, Tensor | None]:
    of_weight = torch.zeros_like(weight, dtype=_exact(weight))
    of_bias = None if bias is None else torch.zeros_like(bias, dtype=_exact(weight))
    for chunk, logits, matrix in _chunks_of_logits(hidden, weight, bias):
        cross_entropy_(logits, targets[chunk], factors[chunk], extras, has_grad=True)
        of_weight += logits.to(matrix.dtype).T @ hidden[chunk].to(matrix.dtype)
        if of_bias is not None:
            of_bias += logits.sum(0)
    return of_weight.to(weight.dtype), None if of_bias is None or bias is None else of_bias.to(bias.dtype)


def _chunks_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """Of each chunk its rows, its logits (to be overwritten), and the head's matrix in the type it is used in."""
    dtype, exact = compute_dtype(weight), _exact(weight)
    rows = chunk_rows(weight, exact)
    # By hand: autocast would keep its copy of the weight, made without a graph, for others to find.
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            yield chunk, functional.linear(hidden[chunk].to(dtype), matrix, offset).to(exact), matrix


def _likeliest_other(logits: Float[Tensor, "rows vocabulary"], tokens: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    first, second = logits.topk(2, dim=-1).indices.unbind(-1)
    return torch.where(first == tokens, second, first)


def _exact(weight: Tensor) -> torch.dtype:
    return torch.promote_types(compute_dtype(weight), torch.float32)
