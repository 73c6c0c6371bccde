"""Clotho: CSV of file_name and caption_1 to caption_5. Every caption makes a row, or the first alone does."""

from collections.abc import Iterator
from typing import Any

from mllm.data.importers.base import Fields, Importer, Record
from mllm.data.importers.preferences import has_keys, text_of
from mllm.data.importers.questions import DESCRIBE_SOUND, caption_of, option, question_row
from mllm.data.sources import Source
from mllm.errors import OptionError

CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))
OPTIONS = {"captions": "all", "question": DESCRIBE_SOUND}


def matches(fields: Any, source: Source) -> bool:
    """Whether a record has a file name and five captions."""
    return has_keys(fields, "file_name", *CAPTIONS)


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """Five rows of one file, or one."""
    fields, wanted = record.fields, option(source, OPTIONS, "captions")
    if wanted not in ("all", "first"):
        raise OptionError(f"captions = {wanted!r}", expected="all or first", do="correct the option of the source")
    name = text_of(fields, "file_name")
    for number, key in enumerate(CAPTIONS if wanted == "all" else CAPTIONS[:1]):
        yield question_row(
            f"{name}/{number}" if wanted == "all" else name,
            {"kind": "audio", "path": name},
            option(source, OPTIONS, "question"),
            caption_of(fields, key),
        )


IMPORTER = Importer(
    name="clotho",
    about="Clotho: CSV of file_name and five captions",
    matches=matches,
    convert=convert,
    options=OPTIONS,
)
