"""What the importers of conversations share: turns, content parts, and the row of a conversation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm.data.importers.base import Fields, ImportProblem, Record
from mllm.data.importers.preferences import media_items, rest_of

MEDIA = {
    **{"image": "image", "video": "video", "audio": "audio"},
    **{"images": "image", "videos": "video", "audios": "audio"},
}
"""Columns that hold media, one or a list, and their kind."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def conversation_row(
    record: Record,
    fields: Mapping[str, Any],
    *,
    messages: list[Fields],
    media: list[Fields],
    used: Sequence[str],
    part: int | None = None,
) -> Fields:
    """The row of a conversation.

    Args:
        record: Where it comes from.
        fields: The record's, or those of the part of it that makes this row.
        messages: Of the row.
        media: Of the row.
        used: Keys that are not to be in `meta`.
        part: Number of this row among several of the record; None for the only one.
    """
    name = fields.get("id")
    row_id = str(name) if isinstance(name, str | int) and name != "" else f"{record.number:08d}"
    row: Fields = {
        "id": row_id if part is None else f"{row_id}/{part}",
        "messages": messages,
        "media": media,
    }
    origin = fields.get("data_source") or fields.get("source")
    if isinstance(origin, str):
        row["source"] = origin
        used = (*used, "data_source", "source")
    if meta := rest_of(fields, ("id", *used)):
        row["meta"] = meta
    return row


def media_columns(fields: Mapping[str, Any]) -> dict[str, list[Fields]]:
    """The media in a record's columns by kind, kinds without media left out."""
    media: dict[str, list[Fields]] = {}
    for key, kind in MEDIA.items():
        if items := media_items(fields.get(key), kind):
            media.setdefault(kind, []).extend(items)
    return media


def has_media_columns(fields: Mapping[str, Any]) -> bool:
    """Whether a column of media holds something."""
    return any(fields.get(key) for key in MEDIA)


def is_text_alone(fields: Any) -> bool:
    """Whether a record is a conversation without media and content parts."""
    if not isinstance(fields, Mapping):
        return False
    turns = fields.get("messages") or fields.get("conversations") or []
    texts = [turn.get("content", turn.get("value")) for turn in turns]
    return not has_media_columns(fields) and all(isinstance(text, str) for text in texts)


def check_turns(roles: Sequence[str]) -> None:
    """Check that users and assistants take turns, behind at most one system message.

    Raises:
        ImportProblem: They do not.
    """
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * len(spoken)
    if "assistant" not in spoken or list(spoken) != expected[: len(spoken)]:
        raise ImportProblem(f"turns of {_few(roles)}; expected user, assistant, user, assistant, ...")


def parts_of(content: Sequence[Any]) -> Iterator[Fields]:
    """The parts of a content without the `None` keys that Arrow adds to them.

    Raises:
        ImportProblem: One is no object with a `type`.
    """
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ImportProblem(f"a part {part!r:.60} of a message; expected an object with `type`")
        yield {key: value for key, value in part.items() if value is not None}


def _few(roles: Sequence[str]) -> str:
    return ", ".join(roles[:6]) + (", ..." if len(roles) > 6 else "")
