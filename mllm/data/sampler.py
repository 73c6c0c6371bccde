"""Which rows stand in which micro-batch of which rank: planned for all ranks at once."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DataLoader, Sampler

from mllm.data.order import EpochOrder


def rank_batches(order: np.ndarray, *, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """One rank's micro-batches of an epoch, as positions of rows.

    Over all ranks every entry of `order` stands exactly once. All ranks get equally many micro-batches, of which the
    last may be short or empty: an empty one weighs nothing, where repeating rows would change the data and leaving
    rows out would lose them.

    Example: the order [3, 0, 4, 1, 2] in batches of 1 on 2 ranks is [3], [4], [2] and [0], [1], [].
    """
    per_step = batch_size * world_size
    for start in range(0, len(order), per_step):
        rows = order[start : start + per_step]
        share = -(-len(rows) // world_size)
        yield rows[rank * share : (rank + 1) * share].tolist()


class RankBatches(Sampler[list[int]]):
    """One rank's micro-batches of the current epoch.

    Args:
        order: Of the rows, by epoch and seed.
        batch_size: Rows of a micro-batch.
        rank: This process.
        world_size: All processes.
        seed: With the epoch it decides the order, the same on every rank.
    """

    def __init__(self, order: EpochOrder, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is served."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.order) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch, self.seed)
        return rank_batches(order, batch_size=self.batch_size, rank=self.rank, world_size=self.world_size)


class EpochDataLoader(DataLoader):
    """A DataLoader that hands the epoch on to its batch sampler; `Trainer` tells it to loaders that can be told."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.batch_sampler.set_epoch(epoch)
