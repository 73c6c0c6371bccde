"""What a run gets through: tokens, media and seconds, summed between two lines of the log."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm.data.collate import Collated
from mllm.data.labels import IGNORED

MEDIA_NAMES = {"image": "images", "audio": "audio_clips", "video": "videos"}
"""How several media of a kind are called in the log."""


@dataclass
class Work:
    """What one rank did.

    Args:
        tokens: Read by the model, without padding.
        supervised: Tokens of those that the loss is computed on.
        slots: Places in the batches, padding included.
        media: Media items by kind.
        steps: Optimiser steps.
        seconds: From asking for the first micro-batch of a step to the step's end, over all steps; what is done
            between steps (validation, saving, logging) is not in it.
        waiting: Seconds of those that were spent waiting for data.
    """

    tokens: int = 0
    supervised: int = 0
    slots: int = 0
    media: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    seconds: float = 0.0
    waiting: float = 0.0


class Meter:
    """Counts the work of this rank as it goes by.

    Args:
        clock: Tells the seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._work = Work()
        self._began: float | None = None

    def watch(self, batches: Iterable[Collated]) -> Iterator[Collated]:
        """Hand micro-batches on as they are asked for, and count them."""
        remaining = iter(batches)
        while True:
            asked = self._clock()
            self._began = asked if self._began is None else self._began
            collated = next(remaining, None)
            self._work.waiting += self._clock() - asked
            if collated is None:
                return
            count_batch(self._work, collated.batch)
            self._work.media.update(collated.num_media)
            yield collated

    def end_step(self) -> None:
        """The step that asked for the last micro-batches is done."""
        if self._began is not None:
            self._work.seconds += self._clock() - self._began
        self._work.steps += 1
        self._began = None

    def take(self) -> Work:
        """The work since this was last asked."""
        work, self._work = self._work, Work()
        return work


def count_batch(work: Work, batch: Mapping[str, Any]) -> None:
    """Add a micro-batch, padded or packed; one in which nothing is learned by anybody's rows counts like any other.

    Example: rows of 3 and 5 tokens padded to [2, 5] are 8 tokens in 10 slots.
    """
    work.slots += batch["input_ids"].numel()
    work.tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
    work.supervised += int((batch["labels"][:, 1:] != IGNORED).sum())


def rates(ranks: Sequence[Work]) -> dict[str, float]:
    """The figures of the log, over all ranks: sums by the slowest rank's seconds, and shares of the whole.

    Without any step, or time, there is nothing to say.
    """
    seconds, steps = max(work.seconds for work in ranks), max(work.steps for work in ranks)
    if not steps or seconds <= 0:
        return {}
    slots = sum(work.slots for work in ranks)
    tokens = sum(work.tokens for work in ranks)
    media = sum((work.media for work in ranks), Counter())
    return {
        "tokens_per_second": tokens / seconds,
        "supervised_tokens_per_second": sum(work.supervised for work in ranks) / seconds,
        **{f"{MEDIA_NAMES[kind]}_per_second": count / seconds for kind, count in sorted(media.items())},
        "padding_share": 1.0 - tokens / slots if slots else 0.0,
        "data_wait_share": sum(work.waiting for work in ranks) / sum(work.seconds for work in ranks),
        "seconds_per_step": seconds / steps,
    }
