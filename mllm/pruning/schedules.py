"""How many tokens of an item each stretch of decoder layers sees, for an average over all layers.

Pure arithmetic: from one number, for language models of any depth.
"""

import math
import operator
from collections.abc import Sequence


def starts_of(num_layers: int, num_stretches: int) -> list[int]:
    """The layers at which equal stretches begin, the first of them 0.

    Halves round up: stretches of 6 layers in four begin at 0, 2, 3 and 5. Of fewer layers than stretches each is one.
    """
    num_stretches = min(num_stretches, num_layers)
    return [math.floor(num_layers * number / num_stretches + 0.5) for number in range(num_stretches)]


def lengths_of(starts: Sequence[int], num_layers: int) -> list[int]:
    """How many layers each stretch has."""
    return [end - start for start, end in zip(starts, [*starts[1:], num_layers], strict=True)]


def geometric(average: int, lengths: Sequence[int], *, first: float, most: int) -> list[int]:
    """Tokens of each stretch, each the same share of the one before, so that layers see `average` of them on average.

    The published schedule of VisionDrop is `geometric(32, [8, 8, 8, 8], first=1.5, most=576)`: 48, 35, 26, 19. A model
    of one stretch has no place to shrink: its layers see `average`.

    Args:
        average: Over layers, as near as whole numbers come, and never more.
        lengths: Layers of each stretch.
        first: Of how many times the average the first stretch is.
        most: How many tokens there are.
    """
    num_layers = sum(lengths)
    if average >= most:
        return [most] * len(lengths)
    first = min(first, most / average)
    ratio = _ratio(num_layers / first, lengths)
    wished = [first * average * ratio**number for number in range(len(lengths))]
    return whole(wished, lengths, average * num_layers)


def from_all(average: int, lengths: Sequence[int], *, most: int) -> list[int]:
    """Tokens of each stretch but the first, which sees all, each the same share of the one before.

    The published schedule of PyramidDrop, half of the tokens from stretch to stretch, is
    `from_all(270, [8, 8, 8, 8], most=576)`: 288, 144, 72.

    Args:
        average: Over all layers, as near as whole numbers come, and no more, unless one token in each later layer is.
        lengths: Layers of each stretch, the first among them.
        most: How many tokens there are.
    """
    if average >= most:
        return [most] * (len(lengths) - 1)
    ratio = _ratio(sum(lengths) * average / most, lengths)
    wished = [most * ratio**number for number in range(1, len(lengths))]
    return whole(wished, lengths[1:], sum(lengths) * average - lengths[0] * most)


def whole(wished: Sequence[float], lengths: Sequence[int], total: int) -> list[int]:
    """Whole numbers, falling and at least one, as near to those wished for as a total over layers allows.

    Fractions are cut off, then given back to the largest ones for as long as the total allows. Where even that is too
    much, since each is one at least, the last stretches give way to the first.

    Args:
        wished: Of each stretch, falling.
        lengths: Layers of each stretch.
        total: Which the sum of numbers times lengths does not exceed, unless one token in each layer does.
    """
    counts = [max(1, math.floor(wish + 1e-9)) for wish in wished]
    rest = total - sum(map(operator.mul, counts, lengths))
    while rest < 0 and counts[0] > 1:
        last = max(number for number, count in enumerate(counts) if count > 1)
        counts[last] -= 1
        rest += lengths[last]
    for number in sorted(range(len(counts)), key=lambda number: counts[number] - wished[number]):
        has_fraction = wished[number] - counts[number] > 1e-9
        is_falling = number == 0 or counts[number] < counts[number - 1]
        if has_fraction and is_falling and lengths[number] <= rest:
            counts[number] += 1
            rest -= lengths[number]
    return counts


def per_layer(counts: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The numbers of stretches, layer by layer."""
    return [count for count, length in zip(counts, lengths, strict=True) for _ in range(length)]


def merged_share(count: int, share: float) -> int:
    """How many of so many tokens are merged ones: a share of them, rounded up, and never all.

    An eighth is 6 of 48, 5 of 35, 4 of 26 and 3 of 19, as published for VisionDrop.
    """
    return min(math.ceil(count * share - 1e-9), count - 1)


def _ratio(wanted: float, lengths: Sequence[int]) -> float:
    """From 0 to 1, the ratio whose powers, times the lengths, add up to what is wanted; 0 where they always exceed."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(length * middle**number for number, length in enumerate(lengths)) < wanted:
            low = middle
        else:
            high = middle
    return high
