"""Which tokens are in which layer: the bookkeeping of a prompt whose tokens leave on their way through a model.

Tokens that are left stand in *slots*. The slots of all rows are as many: shorter rows begin with slots that hold
nothing and that nobody attends to, so that the last token of every row is in the last slot, where `generate` looks
for it. Each slot knows its *column*, the place of its token in the prompt as it came.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm.shapes import Bool, Float, Int, Tensor


@dataclass(frozen=True)
class Stage:
    """The tokens of a forward as some layers see them.

    Args:
        columns: Of each slot [B, M].
        is_token: False for slots that hold nothing.
        past: Which slots of these layers' cache hold tokens [B, P]; P is 0 without a cache.
    """

    columns: Int[Tensor, "B M"]
    is_token: Bool[Tensor, "B M"]
    past: Bool[Tensor, "B P"]

    @property
    def mask(self) -> Bool[Tensor, "B U"]:
        """Of all slots, cached ones first."""
        return torch.cat([self.past, self.is_token], dim=1)

    @property
    def counts(self) -> list[int]:
        """Tokens of each row."""
        return self.is_token.sum(dim=1).tolist()

    def compacted_positions(self) -> Int[Tensor, "B M"]:
        """Positions counted without gaps, behind the cached tokens."""
        within = self.is_token.long().cumsum(dim=1) - 1
        return (within + self.past.sum(dim=1, keepdim=True)).clamp(min=0)

    def slots(self, columns_of_row: Int[Tensor, " n"], row: int) -> Int[Tensor, " m"]:
        """The slots of those columns of a row that are still there, in the order of slots."""
        wanted = torch.isin(self.columns[row], columns_of_row) & self.is_token[row]
        return wanted.nonzero()[:, 0]


def first_stage(is_left: Bool[Tensor, "B T"], past: Bool[Tensor, "B P"]) -> Stage:
    """The stage in which the tokens of `is_left` stand in their order."""
    longest = int(is_left.sum(dim=1).max()) if len(is_left) else 0
    # What is not left comes first: those columns are what slots without a token name.
    order = torch.sort(is_left.long(), dim=1, stable=True).indices
    columns = order[:, order.shape[1] - longest :]
    return Stage(columns, is_left.gather(1, columns), past)


def next_stage(
    stage: Stage, slots: Sequence[Int[Tensor, " _"]], past: Bool[Tensor, "B P"], width: int
) -> tuple[Stage, Int[Tensor, "B M"]]:
    """The stage in which only some slots of another are left, and for each new slot, from which of the old.

    Args:
        stage: Before.
        slots: Of each row those that are left, in their new order.
        past: Of the cache of the layers to come.
        width: Columns of the forward.
    """
    longest = max(map(len, slots))
    sources, columns, is_token = [], [], []
    for row, left in enumerate(slots):
        num_empty = longest - len(left)
        sources.append(torch.cat([left.new_zeros(num_empty), left]))
        own = stage.columns[row, left]
        is_free = torch.ones(width, dtype=torch.bool, device=own.device)
        is_free[own] = False
        columns.append(torch.cat([is_free.nonzero()[:num_empty, 0], own]))
        is_token.append(torch.arange(longest, device=own.device) >= num_empty)
    return Stage(torch.stack(columns), torch.stack(is_token), past), torch.stack(sources)


def gathered(values: Tensor, index: Int[Tensor, "B M"], dim: int) -> Tensor:
    """`values` at each row's slots, along an axis that has them.

    Args:
        values: [B or 1, ..., T, ...], or with axes in front of B, as the three positions of Qwen-VL have.
        index: Of the slots.
        dim: The axis of the slots, negative; the rows' axis stands in front of it.
    """
    axis = values.dim() + dim
    shape = [1] * values.dim()
    shape[axis - 1], shape[axis] = index.shape
    wanted = list(values.shape)
    wanted[axis - 1], wanted[axis] = index.shape
    source = values.expand(*values.shape[: axis - 1], index.shape[0], *values.shape[axis:])
    return source.gather(axis, index.view(shape).expand(wanted))


def hidden_at(
    values: Float[Tensor, "B T D"], index: Int[Tensor, "B M"], is_token: Bool[Tensor, "B M"]
) -> Float[Tensor, "B M D"]:
    """Hidden states at slots; zeros where a slot holds nothing, since what was dropped may be no number."""
    return gathered(values, index, -2).masked_fill(~is_token[..., None], 0.0)


def spread(hidden: Float[Tensor, "B M D"], stage: Stage, width: int) -> Float[Tensor, "B T D"]:
    """Hidden states back at the columns of their tokens: what a caller expects of a forward.

    A column whose token has left shows the last token before it that is still there, from which follows what comes
    next; zeros where there is none.
    """
    slots = torch.arange(hidden.shape[1], device=hidden.device).expand_as(stage.columns)
    nowhere = torch.full((len(hidden), width), -1, device=hidden.device)
    slot_of = nowhere.scatter(1, stage.columns, slots.masked_fill(~stage.is_token, -1))
    columns = torch.arange(width, device=hidden.device).expand_as(slot_of)
    last = columns.masked_fill(slot_of < 0, -1).cummax(dim=1).values
    return hidden_at(hidden, slot_of.gather(1, last.clamp(min=0)).clamp(min=0), last >= 0)


def slots_left(
    slots: Int[Tensor, " n"], held: Sequence[Int[Tensor, " _"]], selections: Sequence[Any], *, is_reordered: bool
) -> tuple[Int[Tensor, " m"], list[tuple[Int[Tensor, " _"], Tensor]]]:
    """The slots of a row that stay, in their new order; and new hidden states, with their places in that order.

    Args:
        slots: That hold its tokens, in order.
        held: Those of each of its visual items.
        selections: For each of these a `Selection`, or None to keep all.
        is_reordered: Whether an item's tokens take the order that its selection has them in.
    """
    order = torch.full((int(slots[-1]) + 1,), -1, dtype=torch.long, device=slots.device)
    order[slots] = slots
    for own, selection in zip(held, selections, strict=True):
        if selection is not None:
            order[own] = -1
            sources = own[selection.kept]
            order[sources.sort().values if is_reordered else sources] = sources
    left = order[order >= 0]
    places = torch.empty_like(order).scatter(0, left, torch.arange(len(left), device=left.device))
    values = [
        (places[own[selection.kept]], selection.values)
        for own, selection in zip(held, selections, strict=True)
        if selection is not None and selection.values is not None
    ]
    return left, values


def segments_of(columns: Int[Tensor, " M"], lengths: Sequence[int]) -> Int[Tensor, " M"]:
    """Which segment of a packed row each column is in."""
    ends = torch.tensor(lengths, device=columns.device).cumsum(0)
    return torch.bucketize(columns, ends, right=True)


def places_in_segments(segments: Int[Tensor, " M"]) -> Int[Tensor, " M"]:
    """Positions counted anew from 0 in each segment."""
    counts = torch.bincount(segments)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(segments), device=segments.device) - starts[segments]


def num_shared_at_end(is_shared: Bool[Tensor, "B T"]) -> int:
    """How many columns at the end are such in all rows."""
    return int(is_shared.all(dim=0).flip(0).cumprod(0).sum())
