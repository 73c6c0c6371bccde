"""What became of the rows: written, skipped because the form cannot say them, and what the written ones lost."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mllm.data.schema import Row
from mllm.errors import OptionError, RowError

ON_UNSAYABLE = ("error", "skip")
Said = TypeVar("Said")


class Unsayable(Exception):
    """Raised for a row that a form has no words for; the message is the reason, to count."""


@dataclass(slots=True)
class Report:
    """The outcome of a writer.

    Args:
        written: Rows that are in the files.
        skipped: Rows that are not, by reason.
        lost: Written rows by what they lost: things that do not change what the row teaches as it stands.
        files: What was written.
    """

    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    files: list[Path] = field(default_factory=list)


def say_all(rows: Iterable[Row], say: Callable[[Row], Said], report: Report, *, on_unsayable: str) -> Iterator[Said]:
    """What `say` makes of each row; rows it has no words for are an error, or counted.

    Raises:
        OptionError: `on_unsayable` is neither.
        RowError: A row cannot be said, and `on_unsayable` is "error".
    """
    if on_unsayable not in ON_UNSAYABLE:
        raise OptionError(
            f"on_unsayable = {on_unsayable!r}", expected=f"one of {', '.join(ON_UNSAYABLE)}", do="choose one"
        )
    for row in rows:
        try:
            said = say(row)
        except Unsayable as reason:
            if on_unsayable == "error":
                raise RowError(
                    f"{row.name}: {reason}",
                    expected="a row that this form has words for",
                    do="leave such rows out (on_unsayable: skip, they are counted), or write another form",
                ) from reason
            report.skipped[str(reason)] += 1
            continue
        report.written += 1
        yield said
