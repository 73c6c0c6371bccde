"""LTU's OpenAQA and OpenASQA: instruction, input, audio_id (a path), dataset, task, output.

The sound stands in front of the instruction; a non-empty `input` stands behind it, on a line of its own.
"""

from collections.abc import Iterator
from typing import Any

from mllm.data.importers.base import Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import has_keys, media_items, rest_of, text_of
from mllm.data.importers.questions import question_row, row_id
from mllm.data.sources import Source

USED = ("id", "instruction", "input", "audio_id", "output")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record is an instruction about a sound."""
    return has_keys(fields, "instruction", "audio_id", "output")


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    fields = record.fields
    media = media_items(fields.get("audio_id"), "audio")
    if len(media) != 1:
        raise ImportProblem(f"audio_id = {fields.get('audio_id')!r:.60}; expected one file")
    question = text_of(fields, "instruction")
    if fields.get("input"):
        question += "\n" + text_of(fields, "input")
    yield question_row(
        row_id(record),
        media[0],
        question,
        text_of(fields, "output"),
        meta=rest_of(fields, USED),
    )


IMPORTER = Importer(
    name="openaqa",
    about="LTU OpenAQA and OpenASQA: instruction, input, audio_id, dataset, task, output",
    matches=matches,
    convert=convert,
)
