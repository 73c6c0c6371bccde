"""Which rows stand in which micro-batch of this rank: its share of a plan that is made for all ranks at once."""

from collections.abc import Iterator

from torch.utils.data import DataLoader, Sampler

from mllm.data.batch_plan import BatchPlan


class RankBatches(Sampler[list[int]]):
    """One rank's micro-batches of the current epoch.

    Args:
        plan: Of all ranks, the same on every rank.
        rank: This process.
    """

    def __init__(self, plan: BatchPlan, *, rank: int = 0):
        self.plan = plan
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose plan is served."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        return (step[self.rank].tolist() for step in self.plan(self.epoch))


class EpochDataLoader(DataLoader):
    """A DataLoader that hands the epoch on to its batch sampler; `Trainer` tells it to loaders that can be told."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.batch_sampler.set_epoch(epoch)
