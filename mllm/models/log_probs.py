"""Log-probabilities of supervised tokens, to go backward from: what preference losses are made of. Pure.

As in `mllm.models.loss` only the states in front of supervised tokens reach the head, a chunk of them at a time. What
a loss makes of the log-probabilities is known only when all of them are, so the gradient of each is kept, a vector of
the model's width, and weighed on the way back. Only where the head itself is trained are its logits computed again.
"""

from collections.abc import Iterator
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
        wants_hidden, *wants_head = ctx.needs_input_grad[:3] if has_graph else (False,) * 3
        gradient = torch.empty_like(hidden) if wants_hidden else None
        head = _Head(weight, bias)
        losses = torch.empty(len(hidden), dtype=head.exact, device=hidden.device)
        with _no_autocast(hidden):
            for chunk in head.chunks(hidden):
                logits = head.logits(hidden[chunk])
                if own is not None:
                    targets[chunk] = torch.where(own[chunk], _likeliest_other(logits, targets[chunk]), targets[chunk])
                losses[chunk] = cross_entropy_(logits, targets[chunk], None, extras, has_grad=wants_hidden)
                if gradient is not None:
                    gradient[chunk] = logits.to(head.dtype) @ head.matrix
        ctx.extras, ctx.dtype, ctx.wants_head = extras, head.dtype, any(wants_head)
        ctx.save_for_backward(gradient, targets, *((hidden, weight, bias) if ctx.wants_head else ()))
        return -losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " S"]) -> tuple[Tensor | None, ...]:
        # The kept gradients are those of losses, which are negative log-probabilities.
        gradient, targets, *inputs = ctx.saved_tensors
        of_hidden = None if gradient is None else gradient * -grad.unsqueeze(-1).to(gradient.dtype)
        if not ctx.wants_head:
            return (of_hidden, *(None,) * 6)
        hidden, weight, bias = inputs
        head = _Head(weight, bias, ctx.dtype)
        of_weight, of_bias = _head_gradients(head, hidden, targets, -grad, ctx.extras)
        of_bias = None if of_bias is None else of_bias.to(bias.dtype)
        return (of_hidden, of_weight.to(weight.dtype), of_bias, *(None,) * 4)


class _Head:
    """A head in the type that it multiplies in.

    Args:
        weight: Its matrix.
        bias: Its bias, if it has one.
        dtype: The type. On the way back autocast is off, and cannot be asked any more.
    """

    def __init__(
        self,
        weight: Float[Tensor, "vocabulary D"],
        bias: Float[Tensor, " vocabulary"] | None,
        dtype: torch.dtype | None = None,
    ):
        self.dtype = dtype or compute_dtype(weight)
        self.exact = torch.promote_types(self.dtype, torch.float32)
        self.matrix = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)

    def chunks(self, hidden: Float[Tensor, "S D"]) -> Iterator[slice]:
        """The rows that are looked at together."""
        rows = chunk_rows(self.matrix, self.exact)
        return (slice(start, start + rows) for start in range(0, len(hidden), rows))

    def logits(self, hidden: Float[Tensor, "rows D"]) -> Float[Tensor, "rows vocabulary"]:
        """Of a chunk, to be overwritten."""
        return functional.linear(hidden.to(self.dtype), self.matrix, self.bias).to(self.exact)


def _head_gradients(
    head: _Head,
    hidden: Float[Tensor, "S D"],
    targets: Int[Tensor, " S"],
    factors: Float[Tensor, " S"],
    extras: LogitExtras,
) -> tuple[Float[Tensor, "vocabulary D"], Float[Tensor, " vocabulary"] | None]:
    """Of weight and bias, summed over chunks in the exact type."""
    of_weight = torch.zeros_like(head.matrix, dtype=head.exact)
    of_bias = None if head.bias is None else torch.zeros_like(head.bias, dtype=head.exact)
    with _no_autocast(hidden):
        for chunk in head.chunks(hidden):
            logits = head.logits(hidden[chunk])
            cross_entropy_(logits, targets[chunk], factors[chunk], extras, has_grad=True)
            of_weight += logits.to(head.dtype).T @ hidden[chunk].to(head.dtype)
            if of_bias is not None:
                of_bias += logits.sum(0)
    return of_weight, of_bias


def _no_autocast(hidden: Tensor) -> torch.autocast:
    """It would keep its copy of the weight, made without a graph, for others to find: types are settled by hand."""
    return torch.autocast(hidden.device.type, enabled=False)


def _likeliest_other(logits: Float[Tensor, "rows vocabulary"], tokens: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    first, second = logits.topk(2, dim=-1).indices.unbind(-1)
    return torch.where(first == tokens, second, first)
