"""Several sources as one sequence of rows: how much of each, and in which order an epoch reads them."""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from mllm.data.order import EpochOrder, weighted_order
from mllm.data.schema import Row
from mllm.data.sources import Source
from mllm.errors import OptionError

_TAKE = re.compile(r"(first|end|random):(?:(\d+)|(\d+(?:\.\d+)?)%)")


@dataclass(frozen=True)
class Take:
    """How much of a source is used, as LLaVA-NeXT's mixture files say it: "all", "first:1000", "end:10%", "random:5%".

    Args:
        rule: "all", "first", "end" or "random".
        number: Of rows, or None.
        percent: Of the rows, rounded up as LLaVA-NeXT does, or None.
    """

    rule: str
    number: int | None = None
    percent: float | None = None

    def positions(self, size: int, seed: Sequence[int]) -> np.ndarray:
        """Ascending positions of the rows that are used; a source with fewer rows than asked for gives all.

        A smaller random part is part of a larger one of the same seed.
        """
        count = size if self.number is None else min(self.number, size)
        if self.percent is not None:
            # Without the inner rounding, 1.1% of 1000 rows would be 12: the product is 11.000000000000002.
            count = min(math.ceil(round(self.percent * size / 100, 9)), size)
        if self.rule == "end":
            return np.arange(size - count, size)
        if self.rule == "random":
            return np.sort(np.random.default_rng(list(seed)).permutation(size)[:count])
        return np.arange(count)


def parse_take(text: Any) -> Take:
    """Read a take rule.

    Raises:
        OptionError: It is none.
    """
    if text == "all":
        return Take("all")
    match = _TAKE.fullmatch(text) if isinstance(text, str) else None
    number, percent = (int(match[2] or 0), float(match[3] or 0)) if match else (0, 0.0)
    if match is None or not (number > 0 or 0 < percent <= 100):
        raise OptionError(
            f"take = {text!r:.60}",
            expected="all, first:N, end:N or random:N; N a number of rows from 1, or a percentage such as 10%",
            do="correct it",
        )
    return Take(match[1], number or None, percent or None)


class Mixture(Sequence[Row]):
    """The rows that are used of several indexes, one behind the other.

    Args:
        indexes: Opened sources (`mllm.data.indexing.index.RowIndex`).
        temperature: Makes weights of the numbers of rows, see `weighted_order`.
        epoch_rows: Length of an epoch; by default the number of all rows.
        seed: Decides which rows "random:N" takes.

    Raises:
        OptionError: A take rule or a weight is wrong, or a source has no rows left to take.
    """

    def __init__(
        self,
        indexes: Sequence[Any],
        *,
        temperature: float | None = None,
        epoch_rows: int | None = None,
        seed: int = 0,
    ):
        self.indexes = list(indexes)
        self.temperature = temperature
        self.epoch_rows = epoch_rows
        self.taken = [_taken(index, seed) for index in indexes]
        self.ends = list(accumulate(len(taken) for taken in self.taken))
        self.order = self.order_of(range(len(self)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, position: Any) -> Any:
        source = self.source_number(position)
        return self.indexes[source][int(self.taken[source][position - self._start(source)])]

    def source_number(self, position: int) -> int:
        """Which index a row comes from."""
        if not 0 <= position < len(self):
            raise IndexError(f"row {position} of {len(self)}")
        return bisect_right(self.ends, position)

    def source(self, position: int) -> Source:
        """The source a row comes from."""
        return self.indexes[self.source_number(position)].source

    def order_of(self, used: Sequence[int] | np.ndarray) -> EpochOrder:
        """The order of epochs of some of the rows: the mixture's shares hold for what is really used.

        Args:
            used: Ascending positions; the order counts them from 0.
        """
        places = np.searchsorted(self.ends, np.asarray(used, np.int64), side="right")
        sizes = np.bincount(places, minlength=len(self.indexes)).tolist()
        return weighted_order(
            sizes,
            [index.source.weight for index in self.indexes],
            temperature=self.temperature,
            epoch_rows=self.epoch_rows,
        )

    def epoch_order(self, epoch: int, seed: int) -> np.ndarray:
        """Positions of an epoch's rows, shuffled. Pure; without weights every position stands there once."""
        return self.order(epoch, seed)

    @property
    def char_lengths(self) -> np.ndarray:
        """UTF-8 bytes of all texts of each row."""
        parts = [index.char_lengths[taken] for index, taken in zip(self.indexes, self.taken, strict=True)]
        return np.concatenate([np.empty(0, np.int32), *parts])

    def fingerprints(self) -> list[dict[str, Any]]:
        """What every source is and what became of its rows, for the record of a run."""
        return [
            {
                "path": str(index.source.path),
                "name": index.source.name,
                "sha256": index.key,
                "revision": index.source.revision,
                "licence": index.source.licence or index.licence,
                "take": index.source.take,
                "weight": index.source.weight,
                "rows": len(taken),
                "bad": index.num_bad,
                "dropped": dict(index.dropped),
            }
            for index, taken in zip(self.indexes, self.taken, strict=True)
        ]

    def _start(self, source: int) -> int:
        return self.ends[source - 1] if source else 0


def _taken(index: Any, seed: int) -> np.ndarray:
    """Positions of a source's rows; the content's own hash keeps random ones when sources change places."""
    source = index.source
    if source.weight is not None and not source.weight > 0:
        raise OptionError(f"data: {source.path}: weight = {source.weight}", expected="more than 0", do="correct it")
    taken = parse_take(source.take).positions(len(index), [seed, int(index.key[:16], 16)])
    if not len(taken):
        raise OptionError(
            f"data: {source.path} has no rows ({index.num_bad} bad, {sum(index.dropped.values())} dropped)",
            expected="at least one row",
            do="name another file",
        )
    return taken
