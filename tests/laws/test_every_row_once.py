"""Every row exactly once over ranks, workers and resume; the same order for the same seed; weights as stated."""

from collections import Counter
from itertools import chain

import pytest
from accelerate import skip_first_batches
from torch.utils.data import Dataset

from mllm.data.order import EpochOrder, every_row_once, weighted_order
from mllm.data.sampler import EpochDataLoader, RankBatches, rank_batches

SIZES = [(12, 2, 1), (13, 2, 1), (13, 4, 2), (17, 4, 3), (3, 2, 4), (1, 8, 2), (9, 4, 2)]
SOURCES = (7, 20, 10)
MIXED = weighted_order(SOURCES, [2.0, 1.0, None], epoch_rows=43)  # 22, 11 and 10 rows an epoch


@pytest.mark.parametrize(("num_rows", "batch_size", "world_size"), SIZES)
def test_ranks_together_hold_every_row_once(num_rows, batch_size, world_size):
    order = every_row_once(num_rows)(0, 0)
    ranks = [
        list(rank_batches(order, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert sorted(chain.from_iterable(chain.from_iterable(ranks))) == list(range(num_rows))
    assert {len(batches) for batches in ranks} == {-(-num_rows // (batch_size * world_size))}
    assert all(len(batch) <= batch_size for batches in ranks for batch in batches)
    assert all(len(batch) == batch_size for batches in ranks for batch in batches[:-1])


def test_ranks_agree_on_the_order_and_epochs_differ():
    samplers = [RankBatches(every_row_once(13), batch_size=2, rank=rank, world_size=3, seed=7) for rank in range(3)]
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


@pytest.mark.parametrize("order", [every_row_once(*SOURCES), MIXED], ids=["every row once", "weighted"])
def test_two_ranks_with_two_workers_each_serve_the_epoch_and_nothing_else(order):
    """Real workers. Without weights every row stands once; with weights, as often as the shares say."""
    for epoch in (0, 3):
        served = [_serve(order, rank=rank, epoch=epoch, num_workers=2) for rank in range(2)]
        assert Counter(chain.from_iterable(chain(*served))) == Counter(order(epoch, 5).tolist())
        again = [_serve(order, rank=rank, epoch=epoch, num_workers=0) for rank in range(2)]
        assert served == again


def test_weights_match_within_counting_error():
    """Of the rows that weighted sources share, each gets its part to the row, in every epoch."""
    for epoch in range(4):
        rows = MIXED(epoch, 1).tolist()
        shares = [sum(start <= row < end for row in rows) for start, end in ((0, 7), (7, 27), (27, 37))]
        assert shares[2] == 10 and sum(shares) == 43
        assert abs(shares[0] - 33 * 2 / 3) < 1 and abs(shares[1] - 33 / 3) < 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("order", [every_row_once(13), MIXED], ids=["every row once", "weighted"])
def test_killed_at_any_step_the_same_rows_remain(order, num_workers):
    """As `Trainer` goes on within an epoch: it skips through accelerate, which makes another loader of ours."""
    for rank in range(2):
        whole = _serve(order, rank=rank, epoch=2, num_workers=num_workers)
        steps = range(1, len(whole)) if num_workers == 0 else (1, len(whole) - 1)  # starting workers takes its time
        for step in steps:
            loader = _loader(order, rank=rank, num_workers=num_workers)
            rest = skip_first_batches(loader, step)
            for told in (rest, rest.batch_sampler, getattr(rest.batch_sampler, "batch_sampler", None)):
                if hasattr(told, "set_epoch"):
                    told.set_epoch(2)
            assert list(rest) == whole[step:]


class _Numbers(Dataset):
    def __len__(self):
        return sum(SOURCES)

    def __getitem__(self, index):
        return index


def _loader(order: EpochOrder, *, rank: int, num_workers: int) -> EpochDataLoader:
    batches = RankBatches(order, batch_size=2, rank=rank, world_size=2, seed=5)
    return EpochDataLoader(_Numbers(), batch_sampler=batches, collate_fn=list, num_workers=num_workers)


def _serve(order: EpochOrder, *, rank: int, epoch: int, num_workers: int) -> list[list[int]]:
    loader = _loader(order, rank=rank, num_workers=num_workers)
    loader.set_epoch(epoch)
    return list(loader)
