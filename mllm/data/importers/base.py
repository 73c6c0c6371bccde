"""What an importer is: a name, a test of the first records, and a function from a published record to rows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mllm.data.sources import Source

Fields = dict[str, Any]
"""A row as `mllm.data.schema.parse_row` takes it, media without sizes."""


class ImportProblem(ValueError):
    """A record that cannot become rows. The message says what was found and what was expected, without the place."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a source, as published.

    Args:
        fields: Decoded; embedded media bytes are `EmbeddedBytes`.
        where: File and record, for messages: "a.json, record 12", "b.jsonl, line 3".
        number: Its place in the source, from 0; it makes ids where the record has none.
    """

    fields: Any
    where: str
    number: int


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A place of the file that holds no record, and why; reading goes on behind it where that is possible."""

    where: str
    reason: str
    number: int


@dataclass(frozen=True, slots=True)
class EmbeddedBytes:
    """Bytes of a media item that stand in the source file itself.

    Args:
        data: The bytes; they are looked at once, for the size, and not kept.
        blob: As `mllm.data.schema.Blob`, as a mapping with a `str` container: where to find them again. None for bytes
            that lie nowhere by themselves (base64 in a text): the index keeps those.
        name: What the source calls the item, for messages.
    """

    data: bytes
    blob: Mapping[str, Any] | None = None
    name: str = ""


@dataclass(frozen=True)
class Importer:
    """A published form.

    Args:
        name: As in `format:` of a source.
        about: One line for --help and the docs: which published sets have this form.
        matches: Whether a record is certainly of this form; of all importers, exactly one may say so of any published
            record. Gets the record and the source; must not raise.
        convert: Rows of a record: one or several. Media items hold `kind` and `path` (as published), or `kind` and
            `bytes` (an `EmbeddedBytes`). Raises `ImportProblem` for a broken record, and `Drop` for one that is left
            out on purpose.
        options: Options that `Source.options` may hold, with their defaults.
    """

    name: str
    about: str
    matches: Callable[[Any, Source], bool]
    convert: Callable[[Record, Source], Iterable[Fields]]
    options: Mapping[str, Any] = field(default_factory=dict)


class Drop(Exception):
    """Raised by `convert` for a record that is left out on purpose; the message names the kind of reason, to count."""
