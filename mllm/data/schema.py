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
    _expect(isinstance(fields, dict), where, f"a {type(fields).__name__}", "an object", "write one JSON object a line")
    _check_keys(fields, ROW_KEYS, required=("id", "messages"), where=where)
    is_id = isinstance(fields["id"], str | int)
    _expect(is_id, where, f"id = {fields['id']!r:.60}", "a string or a number", "name the row")
    where_row = f"{where}, row {fields['id']!r}"
    messages = fields["messages"]
    _check_messages(messages, where_row)
    media = fields.get("media") or []
    _expect(isinstance(media, list), where_row, f"media = {media!r:.60}", "a list", "list the row's media items")
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


def _check_messages(messages: Any, where: str) -> None:
    is_list = isinstance(messages, list) and bool(messages)
    _expect(is_list, where, f"messages = {messages!r:.60}", "a list of at least one message", "add the messages")
    for number, message in enumerate(messages):
        here = f"{where}, message {number}"
        is_message = isinstance(message, dict) and "role" in message and "content" in message
        _expect(is_message, here, f"{message!r:.60}", "an object with `role` and `content`", "mend the message")
        roles = ", ".join(ROLES)
        _expect(message["role"] in ROLES, here, f"role = {message['role']!r}", f"one of {roles}", "mend the role")
        content = message["content"]
        is_content = isinstance(content, str) or (
            isinstance(content, list) and all(isinstance(item, dict) and "type" in item for item in content)
        )
        _expect(
            is_content, here, f"content = {content!r:.60}", "a string, or a list of objects with `type`", "mend it"
        )
    answers = [message for message in messages if message["role"] == "assistant" and message.get("loss") is not False]
    _expect(
        bool(answers),
        where,
        "no message of the assistant to learn from",
        "at least one that is trained on",
        "drop the row",
    )


def _parse_media(item: Any, where: str, root: Path) -> MediaItem:
    _expect(isinstance(item, dict), where, f"{item!r:.60}", "an object", "write kind, path, height and width")
    _check_keys(item, MEDIA_KEYS, required=MEDIA_KEYS, where=where)
    kinds = ", ".join(MEDIA_KINDS)
    _expect(item["kind"] in MEDIA_KINDS, where, f"kind = {item['kind']!r}", f"one of {kinds}", "mend the kind")
    is_path = isinstance(item["path"], str) and bool(item["path"])
    _expect(
        is_path, where, f"path = {item['path']!r:.60}", "a file name", "write the image's path, relative to the file"
    )
    size = (item["height"], item["width"])
    is_size = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size)
    _expect(
        is_size, where, f"height, width = {size}", "two positive whole numbers", "write the image's size in pixels"
    )
    return MediaItem(kind=item["kind"], path=root / item["path"], height=item["height"], width=item["width"])


def _check_placeholders(messages: list[dict[str, Any]], media: Sequence[MediaItem], where: str) -> None:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    wanted = [item["type"] for content in contents for item in content if item.get("type") in MEDIA_KINDS]
    found = [item.kind for item in media]
    _expect(
        wanted == found,
        where,
        f"{len(wanted)} media content items {wanted[:4]} and {len(found)} media {found[:4]}",
        "one media item for each media content item, in the same order",
        "add the missing media item, or the missing content item such as {'type': 'image'}",
    )


def _check_keys(fields: dict, known: Sequence[str], *, required: Sequence[str], where: str) -> None:
    missing = [key for key in required if key not in fields]
    _expect(not missing, where, f"no key {missing}", f"the keys {', '.join(required)}", "add the key")
    unknown = [key for key in fields if key not in known]
    _expect(not unknown, where, f"unknown keys {unknown}", f"only {', '.join(known)}", "put other facts into `meta`")


def _expect(is_met: bool, where: str, found: str, expected: str, do: str) -> None:
    if not is_met:
        raise RowError(f"{where}: {found}", expected=expected, do=do)
