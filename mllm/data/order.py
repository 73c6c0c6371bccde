"""Which rows an epoch holds, and in which order. Pure: numbers of rows in, positions out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from mllm.errors import OptionError


@dataclass(frozen=True)
class EpochOrder:
    """The order of the rows of several sources that stand one behind the other.

    Every epoch has the same number of rows of each source. Where that is not the number of rows the source has, they
    are drawn without replacement, in passes that go on from one epoch to the next: no row comes a second time before
    every other row of its source has come once.

    Args:
        sizes: How many rows each source has.
        counts: How many of them an epoch has.

    Example: sizes (4, 2) and counts (2, 4) give epochs of 6 rows: half of the first source, which the next epoch
    completes, and the second source twice.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.counts)

    def __call__(self, epoch: int, seed: int) -> np.ndarray:
        """Positions in the joined sources, shuffled; the same for the same epoch and seed."""
        starts = [0, *accumulate(self.sizes)]
        drawn = [
            starts[source] + _draw(size, count, source=source, epoch=epoch, seed=seed)
            for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True))
        ]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator).numpy()
        return np.concatenate([np.empty(0, np.int64), *drawn])[order]


def every_row_once(*sizes: int) -> EpochOrder:
    """Epochs that hold every row of every source exactly once."""
    return EpochOrder(sizes, sizes)


def weighted_order(
    sizes: Sequence[int],
    weights: Sequence[float | None],
    *,
    temperature: float | None = None,
    epoch_rows: int | None = None,
) -> EpochOrder:
    """How often an epoch takes from each source.

    Sources with a weight share what is left of the epoch in that proportion, by largest remainder; one without a
    weight gives all its rows once. A temperature T makes weights of the numbers of rows n, n ** (1 / T): 1 takes as
    the sources are, a larger one nearer to equally from all. `epoch_rows` alone is as a temperature of 1.

    Args:
        sizes: How many rows each source has; one without rows gets no share.
        weights: Of each source, or None.
        temperature: Instead of weights.
        epoch_rows: Length of an epoch; by default that of all sources together.

    Raises:
        OptionError: Weights and a temperature, or an epoch too short for the sources without a weight.
    """
    is_weighted = any(weight is not None for weight in weights)
    if temperature is not None and is_weighted:
        raise OptionError(
            f"temperature = {temperature}, and a source with a weight",
            expected="one or the other: a temperature makes weights of the numbers of rows",
            do="remove `temperature`, or every `weight`",
        )
    if temperature is not None or (epoch_rows is not None and not is_weighted):
        weights = [size ** (1.0 / (temperature or 1.0)) for size in sizes]
    counts = [size if weight is None else 0 for size, weight in zip(sizes, weights, strict=True)]
    if all(weight is None for weight in weights):
        return EpochOrder(tuple(sizes), tuple(counts))
    shared = (sum(sizes) if epoch_rows is None else epoch_rows) - sum(counts)
    if shared < 0:
        raise OptionError(
            f"epoch_rows = {epoch_rows}, and {sum(counts)} rows of sources without a weight",
            expected="an epoch that has room for all rows of these",
            do="raise `epoch_rows`, or give every source a weight",
        )
    shares = [0.0 if weight is None or not size else weight for size, weight in zip(sizes, weights, strict=True)]
    for source, count in enumerate(largest_remainder(shares, shared)):
        counts[source] += count
    return EpochOrder(tuple(sizes), tuple(counts))


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the shares, none more than 1 off, that sum up to `total`.

    Example: shares (1, 1, 1) of 8 are [3, 3, 2].
    """
    whole = sum(shares)
    if not whole:
        return [0] * len(shares)
    quotas = [total * share / whole for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda n: counts[n] - quotas[n])
    for source in by_remainder[: total - sum(counts)]:
        counts[source] += 1
    return counts


def _draw(size: int, count: int, *, source: int, epoch: int, seed: int) -> np.ndarray:
    """Positions within one source: the part of its endless passes that falls to this epoch."""
    if size == count:
        return np.arange(size)
    parts, start, end = [np.empty(0, np.int64)], epoch * count, (epoch + 1) * count
    while start < end:
        number, skipped = divmod(start, size)
        order = np.random.default_rng([seed, source, number]).permutation(size)
        parts.append(order[skipped : skipped + end - start])
        start += len(parts[-1])
    return np.concatenate(parts)
