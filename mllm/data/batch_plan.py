"""Which rows an epoch's micro-batches hold, planned for all ranks at once. Pure: lengths and costs in, positions out.

A plan is called with an epoch and gives its steps: for each a list with one micro-batch for every rank. All ranks get
equally many, every row of the epoch stands in exactly one, and what is left over at the end gives short or empty
micro-batches. Nothing but seed and epoch decides, so that every rank, and a run that goes on, makes the same plan.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from mllm.data.order import EpochOrder
from mllm.data.packing import pack_in_windows, split_packs

Step = list[np.ndarray]
"""The micro-batches of all ranks, one each, that are computed at the same time."""
WINDOW_STEPS = 100
"""Like is put to like within windows of so many steps: enough for rows of nearly one length to meet, few enough for an
epoch's batches not to be those of the epoch before."""


@runtime_checkable
class BatchPlan(Protocol):
    """An epoch's steps, the same for the same seed and epoch; `len` of it is their number, the same in every epoch."""

    def __call__(self, epoch: int) -> Iterator[Step]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class RandomPlan:
    """Rows in the order of the epoch, whatever their length.

    Args:
        order: Of the rows, by epoch and seed.
        batch_size: Rows of a micro-batch.
        world_size: All processes.
        seed: With the epoch it decides the order.
    """

    order: EpochOrder
    batch_size: int
    world_size: int = 1
    seed: int = 0

    def __len__(self) -> int:
        return -(-len(self.order) // (self.batch_size * self.world_size))

    def __call__(self, epoch: int) -> Iterator[Step]:
        order, per_step = self.order(epoch, self.seed), self.batch_size * self.world_size
        for start in range(0, len(order), per_step):
            yield deal_evenly(order[start : start + per_step], self.world_size)


@dataclass(frozen=True, eq=False)
class LengthPlan:
    """Rows of like length together, so that there is little padding; the batches of an epoch are shuffled.

    Args:
        order: Of the rows, by epoch and seed.
        lengths: Tokens of each row; bounds will do.
        costs: What each row costs to train on, in any unit; see `row_costs`.
        batch_size: Rows of a micro-batch.
        world_size: All processes.
        seed: With the epoch it decides all.
    """

    order: EpochOrder
    lengths: np.ndarray
    costs: np.ndarray
    batch_size: int
    world_size: int = 1
    seed: int = 0

    def __len__(self) -> int:
        return -(-len(self.order) // (self.batch_size * self.world_size))

    def __call__(self, epoch: int) -> Iterator[Step]:
        order, random = self.order(epoch, self.seed), _random(self.seed, epoch)
        per_step = self.batch_size * self.world_size
        alike = like_to_like(order, self.lengths[order], window=WINDOW_STEPS * per_step)
        num_whole = len(order) // per_step
        whole = alike[: num_whole * per_step].reshape(num_whole, per_step)
        dealt = deal_by_cost(whole, self.costs, world_size=self.world_size, random=random)
        for step in random.permutation(num_whole):
            yield list(dealt[step])
        if num_whole < len(self):
            yield deal_evenly(alike[num_whole * per_step :], self.world_size)


@dataclass(frozen=True, eq=False)
class PackedPlan:
    """Rows packed by exact length; packs of like cost are computed at the same time.

    Epochs are shuffled anew, and so need now a pack more and now one less. But every epoch of a run has equally many
    steps, since `Trainer` counts steps by the first one: as many as the epoch that needs most. In the others the packs
    with the most rows are halved.

    Args:
        order: Of the rows, by epoch and seed.
        lengths: Tokens of each row, exactly.
        costs: What each row costs to train on, in any unit; see `row_costs`.
        pack_length: Tokens of a pack at most; no row has more.
        num_epochs: How many epochs the run begins, if each has so many steps.
        world_size: All processes.
        seed: With the epoch it decides all.
    """

    order: EpochOrder
    lengths: np.ndarray
    costs: np.ndarray
    pack_length: int
    num_epochs: Callable[[int], int]
    world_size: int = 1
    seed: int = 0

    def __len__(self) -> int:
        return self._num_steps

    def __call__(self, epoch: int) -> Iterator[Step]:
        random = _random(self.seed, epoch)
        packs = self._packs(epoch)
        assert len(packs) <= self._num_steps * self.world_size, f"epoch {epoch} is behind the end of the run"
        packs = split_packs(packs, self._num_steps * self.world_size)
        costs = np.array([self.costs[pack].sum() for pack in packs])
        shuffled = random.permutation(len(packs))
        alike = like_to_like(shuffled, costs[shuffled], window=WINDOW_STEPS * self.world_size)
        # Empty packs, where rows are fewer than packs, are the last of all.
        steps = alike.reshape(self._num_steps, self.world_size)
        steps = random.permuted(steps, axis=1)[random.permutation(self._num_steps)]
        is_empty = np.array([any(not len(packs[pack]) for pack in step) for step in steps])
        for step in steps[np.argsort(is_empty, kind="stable")]:
            yield [packs[pack] for pack in step]

    @cached_property
    def _num_steps(self) -> int:
        num_steps, epoch = 0, 0
        while epoch < max(1, self.num_epochs(num_steps) if epoch else 1):
            num_steps = max(num_steps, -(-len(self._packs(epoch)) // self.world_size))
            epoch += 1
        return num_steps

    def _packs(self, epoch: int) -> list[np.ndarray]:
        return pack_in_windows(self.order(epoch, self.seed), self.lengths, self.pack_length)


def row_costs(lengths: np.ndarray, media_tokens: np.ndarray, *, width: int, encoder_share: float) -> np.ndarray:
    """What each row costs, in units of one token's way through the language model's matrices.

    n tokens cost n (1 + n / 12 width): a layer's matrices take 24 width^2 operations a token (12 width^2 weights), its
    attention 2 width n on average. A media token costs what the encoder spends on it in addition.

    Args:
        lengths: Tokens of each row.
        media_tokens: Of these, placeholders of media.
        width: Of the language model.
        encoder_share: What the encoder spends for a media token, in the same unit.
    """
    return lengths * (1 + lengths / (12 * width)) + media_tokens * encoder_share


def rank_batches(order: np.ndarray, *, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """One rank's micro-batches of an order, as positions of rows, under a `RandomPlan`.

    Over all ranks every entry of `order` stands exactly once. All ranks get equally many micro-batches, of which the
    last may be short or empty: an empty one weighs nothing, where repeating rows would change the data and leaving
    rows out would lose them.

    Example: the order [3, 0, 4, 1, 2] in batches of 1 on 2 ranks is [3], [4], [2] and [0], [1], [].
    """
    per_step = batch_size * world_size
    for start in range(0, len(order), per_step):
        yield deal_evenly(order[start : start + per_step], world_size)[rank].tolist()


def deal_evenly(rows: np.ndarray, world_size: int) -> Step:
    """Cut rows into one micro-batch for each rank, the last of them shorter or empty.

    Example: [3, 0, 4] for 2 ranks are [3, 0] and [4].
    """
    share = -(-len(rows) // world_size)
    return [rows[rank * share : (rank + 1) * share] for rank in range(world_size)]


def like_to_like(order: np.ndarray, sizes: np.ndarray, *, window: int) -> np.ndarray:
    """Sort a shuffled order by size, largest first, within windows.

    Example: sizes [1, 3, 2, 4] of [a, b, c, d] in windows of 2 give [b, a, d, c].
    """
    return order[np.lexsort((sizes.max(initial=0) - sizes, np.arange(len(order)) // window))]


def deal_by_cost(rows: np.ndarray, costs: np.ndarray, *, world_size: int, random: np.random.Generator) -> np.ndarray:
    """Deal the rows of every step to the ranks, equally many to each, so that the ranks' costs are about equal.

    The costliest rows are dealt first, one to each rank; then in each round the rank with the least so far gets the
    costliest. No rank is always the first.

    Args:
        rows: [steps, rows of a step], positions.
        costs: Of the row at each position.
        world_size: Number of ranks; it divides the rows of a step.
        random: Decides which rank is which.

    Returns:
        [steps, ranks, rows of a micro-batch].

    Example: costs (5, 4, 2, 1) on 2 ranks are dealt as 5 + 1 and 4 + 2.
    """
    num_steps, per_step = rows.shape
    by_cost = np.take_along_axis(rows, np.argsort(-costs[rows], axis=1, kind="stable"), axis=1)
    rounds = by_cost.reshape(num_steps, per_step // world_size, world_size)
    loads = np.zeros((num_steps, world_size))
    dealt = np.empty_like(rounds)
    for number in range(rounds.shape[1]):
        least_first = np.argsort(loads, axis=1, kind="stable")
        np.put_along_axis(dealt[:, number], least_first, rounds[:, number], axis=1)
        loads += costs[dealt[:, number]]
    ranks = random.permuted(np.tile(np.arange(world_size), (num_steps, 1)), axis=1)
    return np.take_along_axis(dealt.transpose(0, 2, 1), ranks[:, :, None], axis=1)


def _random(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])
