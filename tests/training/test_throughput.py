"""What is counted is what stands in the batches, and rates are sums over ranks by the slowest rank's seconds."""

from collections import Counter

import pytest
import torch

from mllm.data.collate import Collated
from mllm.training.throughput import Meter, Work, count_batch, rates

PADDED = {  # rows of 3 and 5 tokens; 1 and 3 of them are learned
    "input_ids": torch.tensor([[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    "labels": torch.tensor([[-100, -100, 3, -100, -100], [-100, -100, 3, 4, 5]]),
}
PACKED = {  # segments of 3 and 2 tokens, of which 2 and 1 are learned
    "input_ids": torch.tensor([[1, 2, 3, 1, 2]]),
    "labels": torch.tensor([[-100, 2, 3, -100, 2]]),
    "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
    "segment_lengths": (3, 2),
}


class Clock:
    """Seconds that pass only when a test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def batches(clock: Clock, *collated: Collated, seconds: float):
    """A loader that takes its time."""
    for one in collated:
        clock.now += seconds
        yield one


def test_padding_is_no_work():
    work = Work()
    count_batch(work, PADDED)
    assert (work.tokens, work.slots, work.supervised) == (8, 10, 4)
    count_batch(work, PACKED)
    assert (work.tokens, work.slots, work.supervised) == (13, 15, 7)


def test_the_first_token_of_a_row_is_never_learned():
    work = Work()
    count_batch(work, {**PADDED, "labels": torch.full((2, 5), 7)})
    assert work.supervised == 8


def test_steps_are_timed_from_the_first_question_for_data_and_nothing_between_them():
    clock = Clock()
    meter = Meter(clock)
    loader = meter.watch(
        batches(clock, *[Collated(PADDED, (), {"image": 2})] * 3, Collated(PACKED, (), {"audio": 1}), seconds=0.25)
    )
    for _ in range(2):
        next(loader), next(loader)  # two micro-batches a step: half a second of waiting
        clock.now += 1.5
        meter.end_step()
        clock.now += 60  # validation
    work = meter.take()
    assert (work.steps, work.seconds, work.waiting) == (2, 4.0, 1.0)
    assert work.media == {"image": 6, "audio": 1}
    assert (work.tokens, work.slots, work.supervised) == (29, 35, 15)
    assert meter.take() == Work()


def test_the_end_of_the_data_is_no_batch():
    meter = Meter(Clock())
    assert list(meter.watch([Collated(PACKED, (), {})])) == [Collated(PACKED, (), {})]
    assert meter.take().slots == 5


def test_rates_are_of_all_ranks_together():
    fast = Work(tokens=600, supervised=60, slots=1000, media=Counter(image=8), steps=4, seconds=1.0, waiting=0.5)
    slow = Work(tokens=200, supervised=20, slots=1000, media=Counter(video=2), steps=4, seconds=2.0, waiting=0.1)
    assert rates([fast, slow]) == {
        "tokens_per_second": 400.0,
        "supervised_tokens_per_second": 40.0,
        "images_per_second": 4.0,
        "videos_per_second": 1.0,
        "padding_share": pytest.approx(0.6),
        "data_wait_share": pytest.approx(0.2),
        "seconds_per_step": 0.5,
    }


def test_without_a_step_nothing_is_said():
    assert rates([Work(), Work()]) == {}
