"""Rows that turn out not to be trained on: why, how many, and when that is too many."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.mixture import Mixture
from mllm.data.quarantine import Bad
from mllm.data.sources import Source
from mllm.errors import MediaError, MllmError

QUARANTINE = "quarantine.jsonl"
BAD = "bad row or media"
Key = tuple[str, str, str]
"""Source, place and id."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not trained on.

    Args:
        position: In the mixture.
        reason: To count by.
        bad: Of a broken row: what is wrong with it.
        error: What to raise where broken rows are no option.
        is_error: Whether it is to be raised in any case.
    """

    position: int
    reason: str
    bad: Bad | None = None
    error: MllmError | None = None
    is_error: bool = False


class LeftOutRows:
    """The account of what is left out. Broken rows are listed, and an error where their source wants that.

    Args:
        rows: What positions refer to.
    """

    def __init__(self, rows: Mixture):
        self.rows = rows
        self.counts: Counter[str] = Counter()
        self.by_source: Counter[tuple[int, str]] = Counter()
        """The same by the number of the source in the mixture and the reason."""
        self.path: Path | None = None
        self._num_read = 0
        self._listed: dict[Key, dict[str, str]] = {}

    def add(self, left_out: LeftOut) -> None:
        """Count a row, and list it if it is broken.

        Raises:
            MllmError: Its source has `on_bad: error`, or more broken rows than `max_bad_rate`.
        """
        source = self.rows.source(left_out.position)
        if left_out.error is not None and (left_out.is_error or source.on_bad == "error"):
            raise left_out.error
        self.count([left_out.position], left_out.reason)
        if left_out.bad is None:
            return
        self._list(_entry(source, left_out.bad))
        num_rows = len(self.rows.taken[self.rows.source_number(left_out.position)])
        num_bad = sum(entry["source"] == str(source.path) for entry in self._listed.values())
        if num_bad > source.max_bad_rate * num_rows:
            raise MediaError(
                f"data: {source.path}: {num_bad} of {num_rows} rows found to be broken when they were due; the last: "
                f"{left_out.bad}",
                expected=f"at most {source.max_bad_rate:.2%} (`max_bad_rate`)",
                do=f"mend them{f' (the list: {self.path})' if self.path else ''}, or raise `max_bad_rate`",
            )

    def count(self, positions: Sequence[int] | np.ndarray, reason: str) -> None:
        """Count rows that are left out for one reason."""
        self.counts[reason] += len(positions)
        numbers = np.searchsorted(self.rows.ends, np.asarray(positions, np.int64), side="right")
        for number, found in zip(*np.unique(numbers, return_counts=True), strict=True):
            self.by_source[int(number), reason] += int(found)

    def write_to(self, path: Path) -> None:
        """Keep the list in a file from now on, which all ranks share, and a run that goes on.

        A new file begins with the rows that were already missing from the indexes.
        """
        self.path = path
        if not path.is_file():
            for index in self.rows.indexes:
                for bad in index.bad():
                    append_line(path, _entry(index.source, bad) | {"found": "indexing"})
            for entry in self._listed.values():
                append_line(path, entry)
        self._read()

    def _list(self, entry: dict[str, str]) -> None:
        self._read()
        if _key(entry) in self._listed:
            return
        self._listed[_key(entry)] = entry
        if self.path is not None:
            append_line(self.path, entry)

    def _read(self) -> None:
        """What this rank and the others have written since we last looked; half a line is left for later."""
        if self.path is None or not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._num_read)
            lines = [line for line in file if line.endswith(b"\n")]
        self._num_read += sum(map(len, lines))
        entries = map(json.loads, lines)
        self._listed |= {_key(entry): entry for entry in entries if entry["found"] == "training"}


def append_line(path: Path, entry: dict[str, str]) -> None:
    """Append in one write, which is whole also where several processes append."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(file, (json.dumps(entry) + "\n").encode())
    finally:
        os.close(file)


def _entry(source: Source, bad: Bad) -> dict[str, str]:
    return {"source": str(source.path), "found": "training", **asdict(bad)}


def _key(entry: dict[str, str]) -> Key:
    return entry["source"], entry["where"], entry["id"]


def raising(left_out: LeftOut) -> None:
    """What to do with a row that is left out where there is no account of them: raise, if it is broken."""
    if left_out.error is not None:
        raise left_out.error


def usable_batches(collated: Iterable[Any], account: Callable[[LeftOut], Any] = raising) -> Iterator[Any]:
    """The batches of `mllm.data.collate.LeavingOut`, as they are asked for; what was left out of them is accounted."""
    for batch, left_out, *_ in collated:
        for row in left_out:
            account(row)
        yield batch
