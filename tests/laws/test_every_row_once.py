"""Every row exactly once over ranks, workers, epochs and resume, under every plan; weights as stated."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from accelerate import skip_first_batches
from torch.utils.data import Dataset

from mllm.data.batch_plan import BatchPlan, LengthPlan, PackedPlan, RandomPlan, rank_batches
from mllm.data.order import EpochOrder, every_row_once, weighted_order
from mllm.data.sampler import EpochDataLoader, RankBatches

SIZES = [(12, 2, 1), (13, 2, 1), (13, 4, 2), (17, 4, 3), (3, 2, 4), (1, 8, 2), (9, 4, 2)]
SOURCES = (7, 20, 10)
MIXED = weighted_order(SOURCES, [2.0, 1.0, None], epoch_rows=43)  # 22, 11 and 10 rows an epoch
ORDERS = {"every row once": every_row_once(*SOURCES), "weighted": MIXED}
PLANS = ("random", "length", "packed")
NUM_EPOCHS = 4
LENGTHS = np.random.default_rng(4).integers(3, 40, 50)


def plan_of(kind: str, order: EpochOrder, *, batch_size: int = 2, world_size: int = 1, seed: int = 5) -> BatchPlan:
    """A plan of this kind over rows of some lengths, whose costs are others; packs take up to 40 tokens."""
    lengths = LENGTHS[: sum(order.sizes)]
    costs = lengths[::-1].astype(float)
    if kind == "random":
        return RandomPlan(order, batch_size, world_size, seed)
    if kind == "length":
        return LengthPlan(order, lengths, costs, batch_size, world_size, seed)
    return PackedPlan(order, lengths, costs, 40, lambda _: NUM_EPOCHS, world_size, seed)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize(("num_rows", "batch_size", "world_size"), SIZES)
def test_ranks_together_hold_every_row_once(num_rows, batch_size, world_size, kind):
    plan = plan_of(kind, every_row_once(num_rows), batch_size=batch_size, world_size=world_size)
    for epoch in range(NUM_EPOCHS):
        ranks = _all_ranks(plan, epoch, world_size)
        assert sorted(chain.from_iterable(chain.from_iterable(ranks))) == list(range(num_rows))
        assert {len(batches) for batches in ranks} == {len(plan)}
        if kind == "packed":
            assert all(LENGTHS[batch].sum() <= 40 for batches in ranks for batch in batches)
            continue
        assert len(plan) == -(-num_rows // (batch_size * world_size))
        assert all(len(batch) <= batch_size for batches in ranks for batch in batches)
        assert all(len(batch) == batch_size for batches in ranks for batch in batches[:-1])


@pytest.mark.parametrize("kind", PLANS)
def test_only_the_last_step_has_ranks_without_a_row(kind):
    for num_rows in range(1, 12):
        plan = plan_of(kind, every_row_once(num_rows), world_size=3)
        ranks = _all_ranks(plan, 0, 3)
        assert all(batch for batches in ranks for batch in batches[:-1])


def test_a_random_plan_is_the_order_cut_up():
    order = np.array([3, 0, 4, 1, 2])
    ranks = [list(rank_batches(order, batch_size=1, rank=rank, world_size=2)) for rank in range(2)]
    assert ranks == [[[3], [4], [2]], [[0], [1], []]]
    plan = plan_of("random", every_row_once(13), world_size=2)
    whole = every_row_once(13)(2, 5)
    cut = [list(rank_batches(whole, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert _all_ranks(plan, 2, 2) == cut


@pytest.mark.parametrize("kind", PLANS)
def test_ranks_agree_on_the_plan_and_epochs_differ(kind):
    """Each rank makes the plan for itself."""
    samplers = [RankBatches(plan_of(kind, every_row_once(13), world_size=3), rank=rank) for rank in range(3)]
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


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_two_ranks_with_two_workers_each_serve_the_epoch_and_nothing_else(order, kind):
    """Real workers. Without weights every row stands once; with weights, as often as the shares say."""
    for epoch in (0, 3):
        served = [_serve(kind, order, rank=rank, epoch=epoch, num_workers=2) for rank in range(2)]
        assert Counter(chain.from_iterable(chain(*served))) == Counter(order(epoch, 5).tolist())
        again = [_serve(kind, order, rank=rank, epoch=epoch, num_workers=0) for rank in range(2)]
        assert served == again


def test_weights_match_within_counting_error():
    """Of the rows that weighted sources share, each gets its part to the row, in every epoch."""
    for epoch in range(4):
        rows = MIXED(epoch, 1).tolist()
        shares = [sum(start <= row < end for row in rows) for start, end in ((0, 7), (7, 27), (27, 37))]
        assert shares[2] == 10 and sum(shares) == 43
        assert abs(shares[0] - 33 * 2 / 3) < 1 and abs(shares[1] - 33 / 3) < 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_killed_at_any_step_the_same_rows_remain(order, kind, num_workers):
    """As `Trainer` goes on within an epoch: it skips through accelerate, which makes another loader of ours."""
    for rank in range(2):
        whole = _serve(kind, order, rank=rank, epoch=2, num_workers=0)
        steps = range(1, len(whole)) if num_workers == 0 else (len(whole) - 1,)  # starting workers takes its time
        for step in steps:
            loader = _loader(kind, order, rank=rank, num_workers=num_workers)
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


def _all_ranks(plan: BatchPlan, epoch: int, world_size: int) -> list[list[list[int]]]:
    samplers = [RankBatches(plan, rank=rank) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


def _loader(kind: str, order: EpochOrder, *, rank: int, num_workers: int) -> EpochDataLoader:
    batches = RankBatches(plan_of(kind, order, world_size=2), rank=rank)
    return EpochDataLoader(_Numbers(), batch_sampler=batches, collate_fn=list, num_workers=num_workers)


def _serve(kind: str, order: EpochOrder, *, rank: int, epoch: int, num_workers: int) -> list[list[int]]:
    loader = _loader(kind, order, rank=rank, num_workers=num_workers)
    loader.set_epoch(epoch)
    return list(loader)
