"""Which rows stand in which micro-batch of which rank: planned for all ranks at once."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler


def plan_epoch(num_rows: int, *, batch_size: int, world_size: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """Row indices as [micro-step][rank][row of the micro-batch].

    Every row stands exactly once. All ranks get equally many micro-batches, of which the last may be short or empty:
    an empty one weighs nothing, where repeating rows would change the data and leaving rows out would lose them.

    Example: 5 rows in batches of 1 on 2 ranks might give [[[3], [0]], [[4], [1]], [[2], []]].
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(num_rows, generator=generator).tolist()
    per_step = batch_size * world_size
    steps = []
    for start in range(0, num_rows, per_step):
        rows = order[start : start + per_step]
        share = -(-len(rows) // world_size)
        steps.append([rows[rank * share : (rank + 1) * share] for rank in range(world_size)])
    return steps


class RankBatches(Sampler[list[int]]):
    """One rank's micro-batches of the current epoch.

    Args:
        num_rows: Rows of the data set.
        batch_size: Rows of a micro-batch.
        rank: This process.
        world_size: All processes.
        seed: With the epoch it decides the order, the same on every rank.
    """

    def __init__(self, num_rows: int, *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is served."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        plan = plan_epoch(
            self.num_rows,
            batch_size=self.batch_size,
            world_size=self.world_size,
            seed=self.seed,
            epoch=self.epoch,
        )
        return iter(step[self.rank] for step in plan)


class EpochDataLoader(DataLoader):
    """A DataLoader that hands the epoch on to its batch sampler; `Trainer` tells it to loaders that can be told."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.batch_sampler.set_epoch(epoch)
