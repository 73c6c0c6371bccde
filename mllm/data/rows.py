"""Row files: random access to JSONL without holding it in memory, and a check of all media before training."""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from mllm.data.schema import Row, parse_row
from mllm.errors import MediaError, OptionError, RowError
from mllm.processing.images import image_size


@dataclass(frozen=True)
class RowSource:
    """One entry of `data:`.

    Args:
        path: A JSONL file of rows.
        first: Only its first rows, all by default.
    """

    path: Path
    first: int | None = None


class RowFile:
    """A JSONL file of rows; only the offsets of its lines are kept in memory.

    Args:
        source: The file, and how much of it.

    Raises:
        OptionError: There is no such file, or it has no rows.
    """

    def __init__(self, source: RowSource):
        self.path = source.path
        if not self.path.is_file():
            raise OptionError(
                f"data: {self.path} is not there",
                expected="a JSONL file of rows",
                do="correct `path` under `data`; relative paths are relative to the YAML file, or to --data_root",
            )
        self.offsets = array("q")
        digest, offset = hashlib.sha256(), 0
        with self.path.open("rb") as lines:
            for line in lines:
                digest.update(line)
                if line.strip() and (source.first is None or len(self.offsets) < source.first):
                    self.offsets.append(offset)
                offset += len(line)
        self.sha256 = digest.hexdigest()
        if not self.offsets:
            raise OptionError(f"data: {self.path} has no rows", expected="at least one line", do="name another file")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Row:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            line = file.readline()
        where = f"{self.path}, row number {index + 1}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise RowError(f"{where}: {error}", expected="one JSON object a line", do="mend the line") from error
        return parse_row(fields, where=where, root=self.path.parent)


class Rows(Sequence[Row]):
    """Several row files as one sequence, in the order they are named."""

    def __init__(self, sources: Sequence[RowSource]):
        self.files = [RowFile(source) for source in sources]
        self.ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self.ends, index)
        start = self.ends[number - 1] if number else 0
        return self.files[number][index - start]

    def fingerprints(self) -> list[dict[str, Any]]:
        """File, number of rows and hash of every source, for the record of a run."""
        return [{"path": str(file.path), "rows": len(file), "sha256": file.sha256} for file in self.files]


def check_media(rows: Sequence[Row], *, progress: Callable[[], Any] | None = None) -> None:
    """Find missing and unreadable media, and sizes that are not the row's, before training. Reads headers only.

    Raises:
        MediaError: The first five that are wrong, and how many there are.
    """
    problems, seen = [], set()
    for row in rows:
        for item in row.media:
            if (item.path, item.height, item.width) not in seen:
                seen.add((item.path, item.height, item.width))
                problems += _media_problem(item, row)
        if progress:
            progress()
    if problems:
        shown = "\n  ".join(problems[:5])
        raise MediaError(
            f"{len(problems)} media items that cannot be used, such as\n  {shown}",
            expected="every file to be there, readable, and of the size on its row",
            do="mend or drop these rows",
        )


def _media_problem(item, row: Row) -> list[str]:
    try:
        size = image_size(item.path, where=row.name)
    except MediaError as error:
        return [error.found]
    if size != (item.height, item.width):
        return [f"{row.name}: {item.path} is {size[0]} x {size[1]}, the row says {item.height} x {item.width}"]
    return []
