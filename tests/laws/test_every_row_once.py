"""Every row exactly once over ranks, workers and resume; empty micro-batches only at the tail."""

from itertools import chain

import pytest
from accelerate import skip_first_batches
from torch.utils.data import Dataset

from mllm.data.sampler import EpochDataLoader, RankBatches, plan_epoch

SIZES = [(12, 2, 1), (13, 2, 1), (13, 4, 2), (17, 4, 3), (3, 2, 4), (1, 8, 2), (9, 4, 2)]


@pytest.mark.parametrize(("num_rows", "batch_size", "world_size"), SIZES)
def test_a_plan_holds_every_row_once(num_rows, batch_size, world_size):
    plan = plan_epoch(num_rows, batch_size=batch_size, world_size=world_size, seed=0, epoch=0)
    rows = [row for step in plan for rank in step for row in rank]
    assert sorted(rows) == list(range(num_rows))
    assert all(len(step) == world_size and all(len(rank) <= batch_size for rank in step) for step in plan)
    assert all(len(rank) == batch_size for step in plan[:-1] for rank in step)


def test_ranks_agree_on_the_plan_and_epochs_differ():
    samplers = [RankBatches(13, batch_size=2, rank=rank, world_size=3, seed=7) for rank in range(3)]
    orders = []
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in samplers]
        assert {len(sampler) for sampler in samplers} == {len(rank) for rank in batches}
        rows = list(chain.from_iterable(chain.from_iterable(batches)))
        assert sorted(rows) == list(range(13))
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_skips_serves_the_rest(num_workers):
    """As `Trainer` goes on within an epoch: it skips through accelerate, which makes another loader of ours."""
    loader = EpochDataLoader(
        _Numbers(), batch_sampler=RankBatches(13, batch_size=2), collate_fn=list, num_workers=num_workers
    )
    loader.set_epoch(2)
    whole = list(loader)
    assert sorted(chain.from_iterable(whole)) == list(range(13))
    loader.set_epoch(0)
    rest = skip_first_batches(loader, 3)
    for told in (rest, rest.batch_sampler, getattr(rest.batch_sampler, "batch_sampler", None)):
        if hasattr(told, "set_epoch"):
            told.set_epoch(2)
    assert list(rest) == whole[3:]


class _Numbers(Dataset):
    def __len__(self):
        return 13

    def __getitem__(self, index):
        return index
