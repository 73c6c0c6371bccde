"""Results on disk as they come, one JSON object a line, so that a step that is killed goes on where it was."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mllm.errors import CheckpointError

Record = dict[str, Any]
"""A result as JSON can hold it."""

NUMBER = "number"
"""Key under which a line says whose result it is."""

SYNC_SECONDS = 1.0
"""Between two waits for the disk. A kill of the process costs nothing that was written; only a crash of the machine
may cost this long."""

Task = TypeVar("Task")


class Journal:
    """The results of a step by the number of what they are of. Lines are only added; the last of a number holds.

    Args:
        path: The file; made where it is not there. What a kill left of a last line is cut off.

    Raises:
        CheckpointError: A line in it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._last_sync = time.monotonic()
        self.records: dict[int, Record] = self._read()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def keep(self, records: dict[int, Record]) -> None:
        """Write results in one piece."""
        if not records:
            return
        lines = (json.dumps({NUMBER: number} | record) for number, record in records.items())
        data = memoryview("".join(f"{line}\n" for line in lines).encode())
        while data:  # one call may write less
            data = data[self._file.write(data) :]
        self.records |= records
        if time.monotonic() - self._last_sync > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._last_sync = time.monotonic()

    def _read(self) -> dict[int, Record]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        try:
            records = [json.loads(line) for line in data[:whole].splitlines()]
            return {record.pop(NUMBER): record for record in records}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path}: a damaged line ({error})",
                expected="one JSON object a line, as it was written",
                do="delete the file; what it held is made anew",
            ) from error


def carry_out(
    journal: Journal,
    numbers: Sequence[int],
    *,
    task_of: Callable[[int], Task],
    work: Callable[[list[Task]], Iterator[tuple[int, Record | None]]],
    portion: int,
    keeps_each: bool,
    progress: Callable[[int], Any] | None = None,
) -> list[int]:
    """Have results of all numbers in a journal.

    Args:
        journal: Where they are kept.
        numbers: Of the tasks; the same, in the same order, whenever the step is taken up again.
        task_of: Makes a task; asked only for those that are handed over.
        work: Does tasks; yields the place of each among them and its result, in any order. None for no result, which
            a later run may get.
        portion: Tasks handed over at once.
        keeps_each: Whether each result is kept as it comes, and never asked for again. Else a portion is kept as a
            whole and, after a kill, done as a whole: what a model computes may depend on the neighbours in a batch.
        progress: Told how many more tasks are done.

    Returns:
        The numbers without a result.
    """
    without: list[int] = []
    for start in range(0, len(numbers), portion):
        part = numbers[start : start + portion]
        missing = [number for number in part if number not in journal.records]
        wanted = missing if keeps_each or not missing else part
        if progress:
            progress(len(part) - len(wanted))
        if not wanted:
            continue
        done: dict[int, Record] = {}
        for place, record in work([task_of(number) for number in wanted]):
            if record is None:
                without.append(wanted[place])
            elif keeps_each:
                journal.keep({wanted[place]: record})
            else:
                done[wanted[place]] = record
            if progress:
                progress(1)
        journal.keep(done)
    return without
