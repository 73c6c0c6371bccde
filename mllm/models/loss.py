"""The training loss of supervised tokens. Pure.

The head is the widest layer of a model: for 8,000 tokens and a vocabulary of 150,000 its logits take 4.5 GiB, and as
much again for each step of the loss. So only the states in front of a supervised token reach it, a chunk of them at a
time, and the gradient of a chunk is computed at once, in the buffer that held its logits. Nothing of a chunk outlives
it but its share of the gradients, and nothing is computed twice, as checkpointing would.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mllm.errors import OptionError
from mllm.shapes import Float, Int, Shaped, Tensor, TokenIds

IGNORED = -100
CHUNK_BYTES = {"cpu": 64 << 20}
"""Size of a chunk's logits in float32, by kind of device. A small vocabulary is one chunk."""
LARGE_CHUNK_BYTES = 256 << 20
"""On other devices, where a chunk has to be worth reading the head's weights for."""


@dataclass(frozen=True)
class LogitExtras:
    """What a head does to its logits behind the linear layer.

    Args:
        scale: They are multiplied by this.
        soft_cap: Then they become cap * tanh(logits / cap), where there is one.
    """

    scale: float = 1.0
    soft_cap: float | None = None


PLAIN_LOGITS = LogitExtras()
"""Of most heads: nothing."""


class SupervisedLoss(NamedTuple):
    """The loss of a batch.

    Args:
        loss: To go backward from.
        token_losses: What each supervised token adds to it before it is divided, in order, without a graph.
    """

    loss: Float[Tensor, ""]
    token_losses: Float[Tensor, " S"]


def supervised_loss(
    hidden: Float[Tensor, "B T D"],
    labels: TokenIds,
    head: nn.Module,
    *,
    loss_weights: Float[Tensor, "B T"] | None = None,
    num_items: Int[Tensor, ""] | Float[Tensor, ""] | int | None = None,
    extras: LogitExtras = PLAIN_LOGITS,
) -> SupervisedLoss:
    """Cross-entropy of the next token at supervised positions, summed and divided by `num_items`.

    No tensor with the vocabulary in it is larger than a chunk, forward or backward, but the gradient of the head's own
    weights; logits are float32 (float64 of a model in float64). Without `num_items` the divisor is the batch's own
    number of supervised tokens (at least 1): then the result is their mean. A trainer that accumulates passes the
    count of the whole global batch instead.

    Args:
        hidden: Last hidden states.
        labels: Token ids, -100 where nothing is learned; aligned with the input (the shift happens here).
        head: The language model's head, a linear layer. It is called once, whatever the number of chunks: where its
            weights are sharded, every rank has to gather them equally often.
        loss_weights: A factor per label, 1 where absent.
        num_items: What the sum is divided by.
        extras: What the head does to its logits.

    Raises:
        OptionError: The head is no plain linear layer, such as a quantised one.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    weights = None if loss_weights is None else loss_weights[:, 1:][supervised]
    with as_forward(head, partial(_losses_of, head)):
        total, token_losses = head(hidden[:, :-1][supervised], targets[supervised], weights, extras)
    if num_items is None:
        num_items = max(1, len(token_losses))
    return SupervisedLoss(total / torch.as_tensor(num_items, device=total.device, dtype=total.dtype), token_losses)


@contextmanager
def as_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module compute something else in its forward, with all its hooks: those that gather its weights."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _losses_of(
    head: nn.Module,
    hidden: Float[Tensor, "S D"],
    targets: Int[Tensor, " S"],
    weights: Float[Tensor, " S"] | None,
    extras: LogitExtras,
) -> tuple[Float[Tensor, ""], Float[Tensor, " S"]]:
    require_linear(head)
    return _ChunkedLoss.apply(hidden, head.weight, head.bias, targets, weights, extras, torch.is_grad_enabled())


def require_linear(head: nn.Module) -> None:
    """Raise an OptionError where a head is more than a matrix that can be read."""
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point() or head.weight.ndim != 2:
        raise OptionError(
            f"the head is a {type(head).__name__} of {getattr(head, 'weight', torch.empty(0)).dtype}",
            expected="a plain linear layer",
            do="leave the head out of what is quantised or adapted",
        )


class _ChunkedLoss(torch.autograd.Function):
    """Linear layer, extras and cross-entropy in one, chunk by chunk; the gradients are computed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "S D"],
        weight: Float[Tensor, "vocabulary D"],
        bias: Float[Tensor, " vocabulary"] | None,
        targets: Int[Tensor, " S"],
        weights: Float[Tensor, " S"] | None,
        extras: LogitExtras,
        has_graph: bool,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " S"]]:
        dtype = compute_dtype(weight)
        exact = torch.promote_types(dtype, torch.float32)
        rows = chunk_rows(weight, exact)
        grads = _Gradients(ctx.needs_input_grad[:3] if has_graph else (False,) * 3, hidden, weight, bias, rows)
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        # By hand: autocast would keep its copy of the weight, made without a graph, for others to find.
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                states = hidden[chunk].to(dtype)
                logits = functional.linear(states, matrix, None if bias is None else bias.to(dtype)).to(exact)
                factors = None if weights is None else weights[chunk].to(exact)
                losses[chunk] = cross_entropy_(logits, targets[chunk], factors, extras, has_grad=grads.are_wanted)
                grads.add(chunk, logits, states, matrix)
        ctx.gradients = grads
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.gradients.scaled_(grad)
        ctx.gradients = None  # scaled in place: good for once
        return (*found, None, None, None, None)


class _Gradients:
    """Of the hidden states, the head's weight and its bias: summed over chunks, in float32 where there are several."""

    def __init__(self, wanted: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None, at_once: int):
        self.are_wanted = any(wanted)
        self._inputs = (hidden, weight, bias)
        sums = weight.dtype if len(hidden) <= at_once else torch.promote_types(weight.dtype, torch.float32)
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=sums) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=sums) if bias is not None and wanted[2] else None

    def add(self, chunk: slice, grad: Float[Tensor, "rows vocabulary"], states: Tensor, matrix: Tensor) -> None:
        """Take a chunk's gradient of the logits."""
        if self.bias is not None:
            self.bias += grad.sum(0)
        if self.hidden is None and self.weight is None:
            return
        grad = grad.to(matrix.dtype)
        if self.hidden is not None:
            self.hidden[chunk] = grad @ matrix
        if self.weight is not None:
            if self.weight.dtype == grad.dtype:
                self.weight.addmm_(grad.T, states)
            else:
                self.weight += grad.T @ states

    def scaled_(self, factor: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times a factor, in the types of what they are gradients of."""
        found = (self.hidden, self.weight, self.bias)
        return tuple(
            None if one is None else one.mul_(factor).to(of.dtype) for one, of in zip(found, self._inputs, strict=True)
        )


def cross_entropy_(
    logits: Float[Tensor, "rows vocabulary"],
    targets: Int[Tensor, " rows"],
    weights: Float[Tensor, " rows"] | None,
    extras: LogitExtras,
    *,
    has_grad: bool,
) -> Float[Tensor, " rows"]:
    """The loss of each row. Its logits become their gradient, in place: softmax minus one at the target."""
    if extras.scale != 1.0:
        logits.mul_(extras.scale)
    slopes = None
    if extras.soft_cap is not None:
        logits.div_(extras.soft_cap).tanh_()
        slopes = 1.0 - logits * logits if has_grad else None
        logits.mul_(extras.soft_cap)
    places = targets.unsqueeze(-1)
    chosen = logits.gather(1, places)
    largest = logits.amax(dim=-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
    losses = (sums.log() + largest - chosen).squeeze(-1)
    if has_grad:
        logits.div_(sums).scatter_add_(1, places, torch.full_like(chosen, -1.0))
        if slopes is not None:
            logits.mul_(slopes)
        factors = extras.scale if weights is None else extras.scale * weights.unsqueeze(-1)
        logits.mul_(factors)
    return losses if weights is None else losses * weights


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What the head multiplies in: autocast's type where that is on, else its own."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def chunk_rows(weight: Shaped[Tensor, "vocabulary D"], dtype: torch.dtype) -> int:
    """How many rows of logits in this type make a chunk."""
    budget = CHUNK_BYTES.get(weight.device.type, LARGE_CHUNK_BYTES)
    return max(1, budget // (weight.shape[0] * dtype.itemsize))
