"""What is left out of a source because it is broken: a list that names every row and every file, with the reason."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mllm.data.sources import Source
from mllm.errors import MediaError, RowError

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Bad:
    """Something broken. A row with two bad files stands in the list twice.

    Args:
        id: Of the row; "" where it could not be read.
        where: File and record.
        file: The media file as the source names it; "" where the row itself is broken.
        reason: What was found, and what was expected.
    """

    id: str
    where: str
    file: str
    reason: str

    def __str__(self) -> str:
        row = f"row {self.id!r} ({self.where})" if self.id else self.where
        return f"{row}: {self.file}: {self.reason}" if self.file else f"{row}: {self.reason}"


class Quarantine:
    """The list while it is written, one JSON object a line.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.num_rows = 0
        self._file = path.open("w", encoding="utf-8")

    def add(self, *bad: Bad) -> None:
        """Leave one row out, for one or several reasons."""
        self.num_rows += 1
        # ASCII, because a reason may show half of a surrogate pair.
        self._file.writelines(json.dumps(asdict(item)) + "\n" for item in bad)

    def close(self) -> None:
        """Write what is still in memory."""
        self._file.close()


def read_quarantine(path: Path) -> Iterator[Bad]:
    """The entries of a list, in the order of the source."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield Bad(**json.loads(line))


def check_quarantine(path: Path, source: Source, *, num_bad: int, num_good: int) -> None:
    """Stop where the source says that so many bad rows are an error.

    Args:
        path: The list.
        source: Its `on_bad` and `max_bad_rate` decide.
        num_bad: Rows that were left out.
        num_good: Rows that remain.

    Raises:
        MediaError: There are too many, and all for their media.
        RowError: There are too many.
    """
    rate = num_bad / max(num_bad + num_good, 1)
    if not num_bad or (source.on_bad == "quarantine" and rate <= source.max_bad_rate):
        return
    shown: list[str] = []
    only_media = True
    for bad in read_quarantine(path):
        only_media &= bool(bad.file)
        if len(shown) < SHOWN:
            shown.append(f"\n  {bad}")
    found = f"data: {source.path}: {num_bad} of {num_bad + num_good} rows cannot be used, such as{''.join(shown)}"
    kind = MediaError if only_media else RowError
    if source.on_bad == "error":
        raise kind(
            found,
            expected="every row to be well formed, and every media file to be there, readable and of the stated size",
            do=f"mend them (the whole list: {path}), or leave them out with `on_bad: quarantine`",
        )
    raise kind(
        found,
        expected=f"at most {source.max_bad_rate:.2%} bad rows (`max_bad_rate`); these are {rate:.2%}",
        do=f"mend them (the whole list: {path}); wrong `media_root` or `format`? Or raise `max_bad_rate`",
    )
