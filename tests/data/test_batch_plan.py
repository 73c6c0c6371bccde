"""Plans by hand: like rows together, costs balanced over ranks, epochs of equally many steps."""

import numpy as np
import pytest

from mllm.data.batch_plan import (
    LengthPlan,
    PackedPlan,
    RandomPlan,
    deal_by_cost,
    deal_evenly,
    like_to_like,
    row_costs,
)
from mllm.data.order import every_row_once, weighted_order


def test_like_to_like_within_windows_and_no_further():
    order, sizes = np.array([10, 11, 12, 13, 14]), np.array([1, 3, 2, 4, 9])
    assert like_to_like(order, sizes, window=2).tolist() == [11, 10, 13, 12, 14]
    assert like_to_like(order, sizes.astype(np.uint32), window=5).tolist() == [14, 13, 11, 12, 10]


def test_what_is_left_over_is_dealt_evenly():
    assert [part.tolist() for part in deal_evenly(np.array([3, 0, 4]), 2)] == [[3, 0], [4]]
    assert [part.tolist() for part in deal_evenly(np.array([7]), 3)] == [[7], [], []]


def test_costs_are_dealt_out_balanced():
    costs = np.array([5.0, 4.0, 2.0, 1.0, 9.0, 3.0, 3.0, 3.0])
    dealt = deal_by_cost(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), costs, world_size=2, random=np.random.default_rng(0))
    # 5 + 1 and 4 + 2; 9 + 3 and 3 + 3, as every rank gets two. Which rank gets which is chance.
    assert [sorted(sorted(rank) for rank in step) for step in dealt.tolist()] == [[[0, 3], [1, 2]], [[4, 7], [5, 6]]]


def test_no_rank_is_always_the_costliest():
    rows = np.arange(400).reshape(200, 2)
    costs = np.tile([2.0, 1.0], 200)
    dealt = deal_by_cost(rows, costs, world_size=2, random=np.random.default_rng(0))
    assert 70 < (costs[dealt[:, 0, 0]] == 2.0).sum() < 130


def test_a_row_costs_its_way_through_the_language_model_and_the_encoder():
    costs = row_costs(np.array([10, 120]), np.array([0, 100]), width=10, encoder_share=0.5)
    assert costs.tolist() == [10 * (1 + 10 / 120), 120 * (1 + 120 / 120) + 50]


@pytest.fixture(scope="module")
def lengths():
    return np.random.default_rng(1).integers(20, 2000, 3000)


def test_length_batches_have_little_padding_and_are_shuffled(lengths):
    order = every_row_once(len(lengths))
    plan = LengthPlan(order, lengths, lengths.astype(float), batch_size=8, world_size=2, seed=3)
    batches = [batch for step in plan(0) for batch in step]
    assert _padding(lengths, batches) < 0.05
    assert _padding(lengths, [batch for step in RandomPlan(order, 8, 2, 3)(0) for batch in step]) > 0.4
    longest = [lengths[batch].max() for batch in batches]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.2
    assert {tuple(batch) for batch in batches}.isdisjoint(tuple(batch) for step in plan(1) for batch in step)


def test_costs_of_a_step_are_balanced_over_ranks(lengths):
    """Encoder costs that have nothing to do with length are balanced, too."""
    random = np.random.default_rng(2)
    costs = row_costs(lengths, 576 * random.integers(0, 5, len(lengths)), width=4096, encoder_share=2.0)
    order = every_row_once(len(lengths))
    random_plan = RandomPlan(order, 8, 4, 3)
    by_length = LengthPlan(order, lengths, costs, 8, 4, 3)
    packed = PackedPlan(order, lengths, costs, 4096, lambda _: 1, 4, 3)
    assert _imbalance(costs, random_plan) > 1.15
    assert _imbalance(costs, by_length) < 1.05
    assert _imbalance(costs, packed) < 1.02


def test_packed_epochs_have_equally_many_steps_whatever_they_need():
    """The sources' shares draw other rows in every epoch; 200 epochs need 25 to 36 packs."""
    lengths = np.concatenate([np.full(100, 90), np.arange(10, 110)])
    order = weighted_order((100, 100), [1.0, 1.0], epoch_rows=45)
    plan = PackedPlan(order, lengths, lengths.astype(float), 120, lambda _: 20, world_size=2, seed=1)
    epochs = [list(plan(epoch)) for epoch in range(20)]
    assert {len(steps) for steps in epochs} == {len(plan)}
    needed = [len(plan._packs(epoch)) for epoch in range(20)]
    assert min(needed) < max(needed) <= 2 * len(plan) < max(needed) + 2
    for epoch, steps in enumerate(epochs):
        rows = np.concatenate([batch for step in steps for batch in step])
        assert sorted(rows) == sorted(order(epoch, 1))
        assert all(len(batch) and lengths[batch].sum() <= 120 for step in steps for batch in step)


def test_epochs_are_counted_as_the_steps_are_known():
    """A run of 40 steps: it needs an epoch more as long as its steps are fewer."""
    lengths = np.full(30, 10)
    asked = []

    def num_epochs(steps):
        asked.append(steps)
        return -(-40 // steps)

    plan = PackedPlan(every_row_once(30), lengths, lengths.astype(float), 30, num_epochs)
    assert len(plan) == 10 and set(asked) == {10} and len(asked) == 4


def test_fewer_rows_than_ranks_leave_empty_micro_batches_at_the_end():
    lengths = np.array([5, 6, 7])
    for plan in (
        LengthPlan(every_row_once(3), lengths, lengths.astype(float), batch_size=1, world_size=2),
        PackedPlan(every_row_once(3), lengths, lengths.astype(float), 7, lambda _: 1, world_size=2),
    ):
        steps = [[batch.tolist() for batch in step] for step in plan(0)]
        assert len(steps) == 2 and sorted(map(len, steps[1])) == [0, 1] and list(map(len, steps[0])) == [1, 1]


def _padding(lengths, batches) -> float:
    return 1 - sum(lengths[batch].sum() for batch in batches) / sum(
        lengths[batch].max() * len(batch) for batch in batches
    )


def _imbalance(costs, plan) -> float:
    loads = np.array([[costs[batch].sum() for batch in step] for step in list(plan(0))[:-1]])
    return float((loads.max(axis=1) / loads.mean(axis=1)).mean())
