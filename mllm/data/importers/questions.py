"""What forms of questions and answers share: the row's id, a question about one file, times and captions."""

from collections.abc import Mapping
from typing import Any

from mllm.data.importers.base import Fields, ImportProblem, Record
from mllm.data.importers.preferences import text_of
from mllm.data.sources import Source

DESCRIBE_SOUND = "Describe the sound."


def row_id(record: Record) -> str:
    """The record's own `id`, or its number."""
    name = record.fields.get("id")
    return f"{record.number:08d}" if name is None or name == "" else str(name)


def question_row(
    name: str, media: Fields, question: str, answer: str, *, system: str = "", meta: Fields | None = None
) -> Fields:
    """A row of one question, its file in front of the words, and its answer."""
    words = [{"type": "text", "text": question}] if question else []
    row: Fields = {
        "id": name,
        "messages": [
            {"role": "user", "content": [{"type": media["kind"]}, *words]},
            {"role": "assistant", "content": answer},
        ],
        "media": [media],
    }
    if system:
        row["messages"].insert(0, {"role": "system", "content": system})
    if meta:
        row["meta"] = meta
    return row


def file_name(pattern: object, fields: Mapping[str, Any]) -> str:
    """The name of a record's file: a pattern such as "{youtube_id}.wav", filled with the record's fields.

    Raises:
        ImportProblem: The record has no such field, or it is empty.
    """
    known = {key: value for key, value in fields.items() if isinstance(value, str | int | float) and value != ""}
    try:
        return str(pattern).format_map(known)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise ImportProblem(
            f"no file name by the pattern {pattern!r} ({type(error).__name__} {error}); "
            f"the record has {', '.join(known)}"
        ) from error


def option(source: Source, defaults: Mapping[str, Any], key: str) -> Any:
    """An option of the importer."""
    return source.options.get(key, defaults[key])


def seconds_of(fields: Mapping[str, Any], key: str) -> float | None:
    """A time in seconds, None where the record says none.

    Raises:
        ImportProblem: It is no number.
    """
    value = fields.get(key)
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ImportProblem(f"{key} = {value!r:.60}; expected seconds") from error


def caption_of(fields: Mapping[str, Any], key: str = "caption") -> str:
    """A caption, blanks at its ends removed.

    Raises:
        ImportProblem: There is none.
    """
    return text_of(fields, key).strip()
