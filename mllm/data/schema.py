"""A row: what recipes write and everything else reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.errors import RowError

ROW_KEYS = ("id", "source", "messages", "media", "meta")
MEDIA_KEYS = ("kind", "path", "height", "width")
ROLES = ("system", "user", "assistant")
MEDIA_KINDS = ("image",)


@dataclass(frozen=True, slots=True)
class MediaItem:
    """A media file and its size, which makes token counts exact without a decode.

    Args:
        kind: "image".
        path: The file.
        height: In pixels, as seen: EXIF orientation applied.
        width: In pixels.
    """

    kind: str
    path: Path
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation and the media its content items stand for, in order of appearance.

    Args:
        id: Names the row in messages; unique within its source by convention.
        source: Where it comes from, such as "digits/caption".
        messages: `role`, `content` (a list of text and media items), and optionally `loss` (a bool or a weight).
        media: One for each media content item.
        where: File and line, for error messages.
        meta: Whatever else the source says; never read by training.
    """

    id: str
    source: str
    messages: list[dict[str, Any]]
    media: tuple[MediaItem, ...]
    where: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row as an error message names it."""
        return f"row {self.id!r} ({self.where})"


def parse_row(fields: Any, *, where: str, root: Path) -> Row:
    """Check one decoded JSON object and make a row of it.

    Args:
        fields: The object.
        where: File and line, for error messages.
        root: What relative media paths are relative to.

    Raises:
        RowError: A key is missing, unknown or of another type, media and placeholders disagree, or nobody answers.
    """
    if not isinstance(fields, dict):
        raise _error(where, f"a {type(fields).__name__}", "an object", "write one JSON object a line")
    _check_keys(fields, ROW_KEYS, required=("id", "messages"), where=where)
    if not isinstance(fields["id"], str | int):
        raise _error(where, f"id = {fields['id']!r:.60}", "a string or a number", "name the row")
    where_row = f"{where}, row {fields['id']!r}"
    messages = fields["messages"]
    _check_messages(messages, where_row)
    media = fields.get("media") or []
    if not isinstance(media, list):
        raise _error(where_row, f"media = {media!r:.60}", "a list", "list the row's media items")
    items = tuple(_parse_media(item, f"{where_row}, media {n}", root) for n, item in enumerate(media))
    _check_placeholders(messages, items, where_row)
    return Row(
        id=str(fields["id"]),
        source=str(fields.get("source", "")),
        messages=messages,
        media=items,
        where=where,
        meta=fields.get("meta") or {},
    )


# Every row of a data set passes here, twice. So messages are put together only where they are needed.


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise _error(where, f"messages = {messages!r:.60}", "a list of at least one message", "add the messages")
    has_answer = False
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise _error(
                f"{where}, message {number}",
                f"{message!r:.60}",
                "an object with `role` and `content`",
                "mend the message",
            )
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise _error(
                f"{where}, message {number}", f"role = {role!r}", f"one of {', '.join(ROLES)}", "mend the role"
            )
        if not isinstance(content, str) and not _is_item_list(content):
            raise _error(
                f"{where}, message {number}",
                f"content = {content!r:.60}",
                "a string, or a list of objects with `type`",
                "mend the message",
            )
        has_answer |= role == "assistant" and message.get("loss") is not False
    if not has_answer:
        raise _error(
            where, "no message of the assistant to learn from", "at least one that is trained on", "drop the row"
        )


def _is_item_list(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(item, dict) and "type" in item for item in content)


def _parse_media(item: Any, where: str, root: Path) -> MediaItem:
    if not isinstance(item, dict):
        raise _error(where, f"{item!r:.60}", "an object", "write kind, path, height and width")
    _check_keys(item, MEDIA_KEYS, required=MEDIA_KEYS, where=where)
    kind, path, height, width = (item[key] for key in MEDIA_KEYS)
    if kind not in MEDIA_KINDS:
        raise _error(where, f"kind = {kind!r}", f"one of {', '.join(MEDIA_KINDS)}", "mend the kind")
    if not isinstance(path, str) or not path:
        raise _error(where, f"path = {path!r:.60}", "a file name", "write the image's path, relative to the row file")
    if not (type(height) is int and type(width) is int and height > 0 and width > 0):  # a bool is an int, too
        raise _error(
            where,
            f"height, width = {(height, width)}",
            "two positive whole numbers",
            "write the image's size in pixels",
        )
    return MediaItem(kind=kind, path=root / path, height=height, width=width)


def _check_placeholders(messages: list[dict[str, Any]], media: Sequence[MediaItem], where: str) -> None:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    wanted = [item["type"] for content in contents for item in content if item["type"] in MEDIA_KINDS]
    found = [item.kind for item in media]
    if wanted != found:
        raise _error(
            where,
            f"{len(wanted)} media content items {wanted[:4]} and {len(found)} media {found[:4]}",
            "one media item for each media content item, in the same order",
            "add the missing media item, or the missing content item such as {'type': 'image'}",
        )


def _check_keys(fields: dict, known: Sequence[str], *, required: Sequence[str], where: str) -> None:
    if missing := [key for key in required if key not in fields]:
        raise _error(where, f"no key {missing}", f"the keys {', '.join(required)}", "add the key")
    if unknown := [key for key in fields if key not in known]:
        raise _error(where, f"unknown keys {unknown}", f"only {', '.join(known)}", "put other facts into `meta`")


def _error(where: str, found: str, expected: str, do: str) -> RowError:
    return RowError(f"{where}: {found}", expected=expected, do=do)
