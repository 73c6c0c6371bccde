"""Files of records of one size, which grow by whole blocks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm.checkpoints import sync
from mllm.errors import CheckpointError


class RecordFile:
    """Records behind one line of JSON that says what they are.

    What a kill left of a last block is cut off when the next is added, so that blocks are always made of the same
    records, whenever a step is taken up again.

    Args:
        path: The file. It may not be there yet.
        block: Records of a block; only the last of a file may have fewer.
    """

    def __init__(self, path: Path, *, block: int):
        self.path = path
        self.block = block

    def num_records(self, total: int) -> int:
        """How many records of all stand in whole blocks."""
        if not self.path.is_file() or not self._first_line().endswith(b"\n"):
            return 0
        dtype, start = self._header()
        found = min((self.path.stat().st_size - start) // dtype.itemsize, total)
        return found if found == total else found - found % self.block

    def add(self, records: np.ndarray, *, at: int) -> None:
        """Write a block behind the first `at` records."""
        if not at:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(json.dumps(records.dtype.descr).encode() + b"\n")
        dtype, start = self._header()
        assert dtype == records.dtype, f"{records.dtype} for {dtype}"
        with self.path.open("r+b") as file:
            file.truncate(start + at * dtype.itemsize)
            file.seek(0, 2)
            file.write(records.tobytes())
        sync(self.path)

    def read(self) -> np.ndarray:
        """All records, from the disk as they are asked for."""
        dtype, start = self._header()
        num_records = (self.path.stat().st_size - start) // dtype.itemsize
        return np.memmap(self.path, dtype, "r", offset=start, shape=(num_records,))

    def _header(self) -> tuple[np.dtype, int]:
        """What a record is, and the byte at which the first begins."""
        line = self._first_line()
        try:
            return np.dtype([_field(field) for field in json.loads(line)]), len(line)
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: its first line is {line[:60]!r}",
                expected="the names and types of its records",
                do="delete the file; what it held is made anew",
            ) from error

    def _first_line(self) -> bytes:
        with self.path.open("rb") as file:
            return file.readline()


def _field(field: Sequence[Any]) -> tuple[Any, ...]:
    """A field of a type as numpy wants it; JSON has made lists of tuples."""
    name, kind, *shape = field
    return (name, kind, *(tuple(one) for one in shape))
