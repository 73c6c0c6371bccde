"""The smallest batch that keeps a device busy."""

from collections.abc import Callable
from itertools import count


def smallest_busy_batch(seconds_of: Callable[[int], float | None], *, most: int = 64, growth: float = 1.8) -> int:
    """The smallest power of two of prompts that keeps a device busy: twice as many take nearly twice as long.

    Args:
        seconds_of: How long so many prompts take; None where they are too many for the device's memory.
        most: Where the search ends.
        growth: How many times as long twice as many have to take.
    """
    seconds = seconds_of(1)
    for batch in (2**power for power in count()):
        doubled = None if batch >= most or seconds is None else seconds_of(2 * batch)
        if doubled is None or seconds is None or doubled >= growth * seconds:
            return batch
        seconds = doubled
    raise AssertionError
