"""A row: what recipes write, importers produce and everything else reads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.errors import RowError
from mllm.sizes import MediaSize

ROW_KEYS = ("id", "source", "messages", "media", "chosen", "rejected", "contrast", "coordinates", "meta")
MEDIA_KEYS = ("kind", "path", "bytes", "blob", "height", "width", "frames", "seconds", "start", "end")
ANSWER_KEYS = ("content", "media")
MESSAGE_KEYS = frozenset({"role", "content", "loss"})
ROLES = ("system", "user", "assistant")
MEDIA_KINDS = ("image", "audio", "video")
COORDINATES = ("pixel", "unit", "padded_unit", "thousandths")
"""How boxes in a text are written: pixels, shares of width and height, shares of the image padded to a square, or
shares of width and height in thousandths."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Where a media item's bytes lie inside another file.

    Either a byte range (`offset`, `length`: a member of a tar, an image inside our index), or a table's cell
    (`column`, `row`, `position` in its list; parquet and Arrow files).

    Args:
        container: The file.
        offset: First byte of the range; -1 for a cell.
        length: Bytes of the range; -1 for a cell.
        column: Column of the table, "" for a byte range.
        row: Row of the table, counted over the whole file.
        position: Place in the cell's list; -1 where the cell holds one item and no list.
    """

    container: Path
    offset: int = -1
    length: int = -1
    column: str = ""
    row: int = -1
    position: int = -1


@dataclass(frozen=True, slots=True)
class MediaItem:
    """A media file and its size, which makes token counts exact without a decode.

    Args:
        kind: "image", "audio" or "video".
        path: The file; None for embedded media, whose bytes `blob` finds.
        height: Of an image or a frame, in pixels, as seen: orientation applied. 0 where nobody has looked yet.
        width: In pixels.
        frames: Of a video, as its header says; 0 if unknown.
        seconds: Length of the whole audio or video file, as its header says; 0.0 if unknown.
        start: Where the cut of an audio or video file begins, in seconds; None for its beginning.
        end: Where the cut ends; None for the end of the file.
        blob: Where the bytes lie, for embedded media.
    """

    kind: str
    path: Path | None
    height: int = 0
    width: int = 0
    frames: int = 0
    seconds: float = 0.0
    start: float | None = None
    end: float | None = None
    blob: Blob | None = None

    @property
    def size(self) -> MediaSize:
        """What its tokens are counted by: of a sound or a video that of the part which `start` and `end` cut out."""
        if self.kind == "image":
            return (self.height, self.width)
        last = self.seconds if self.end is None else min(self.end, self.seconds)
        seconds = max(0.0, last - (self.start or 0.0))
        if self.kind == "audio":
            return (seconds,)
        frames = self.frames
        if frames and self.seconds:
            frames = max(1, round(frames * seconds / self.seconds))  # one is on the screen at any time
        return (self.height, self.width, frames, seconds)


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
        coordinates: How boxes in its texts are written, one of `COORDINATES`; "" if there are none.
    """

    id: str
    source: str
    messages: list[dict[str, Any]]
    media: tuple[MediaItem, ...]
    where: str
    meta: dict[str, Any] = field(default_factory=dict)
    coordinates: str = ""

    @property
    def name(self) -> str:
        """The row as an error message names it."""
        return f"row {self.id!r} ({self.where})"


@dataclass(frozen=True, slots=True)
class Answer:
    """One side of a preference.

    Args:
        content: The assistant's answer: a text, or content items.
        media: What this side is read under in place of the row's media; None for the row's own.
    """

    content: str | list[dict[str, Any]]
    media: tuple[MediaItem, ...] | None = None


@dataclass(frozen=True, slots=True)
class PreferenceRow(Row):
    """A conversation that ends with a question, and a better and a worse answer to it.

    Args:
        chosen: The better answer.
        rejected: The worse answer. It may be the same words under other media.
        contrast: Media under which the chosen answer is dispreferred (Re-Align's retrieved image, mDPO's crop); None
            for no such pair.
    """

    chosen: Answer = Answer("")
    rejected: Answer = Answer("")
    contrast: tuple[MediaItem, ...] | None = None


def parse_row(fields: Any, *, where: str, root: Path) -> Row:
    """Check one decoded JSON object and make a row of it; one with `chosen` becomes a `PreferenceRow`.

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
    is_preference = fields.get("chosen") is not None or fields.get("rejected") is not None
    messages = fields["messages"]
    _check_messages(messages, where_row, needs_answer=not is_preference)
    items = parse_media_list(fields.get("media") or [], where=where_row, root=root)
    _check_placeholders(messages, items, where_row)
    coordinates = fields.get("coordinates") or ""
    if coordinates and coordinates not in COORDINATES:
        raise _error(
            where_row, f"coordinates = {coordinates!r:.60}", f"one of {', '.join(COORDINATES)}", "mend the key"
        )
    source = fields.get("source") or ""
    if not isinstance(source, str):
        raise _error(where_row, f"source = {source!r:.60}", "a string", "name the source")
    meta = fields.get("meta") or {}
    if not isinstance(meta, dict):
        raise _error(where_row, f"meta = {meta!r:.60}", "an object", "put it under a name into an object")
    common = {
        "id": str(fields["id"]),
        "source": source,
        "messages": messages,
        "media": items,
        "where": where,
        "meta": meta,
        "coordinates": coordinates,
    }
    if not is_preference:
        if fields.get("contrast") is not None:
            raise _error(where_row, "contrast without chosen and rejected", "all three", "add the answers")
        return Row(**common)
    contrast = fields.get("contrast")
    return PreferenceRow(
        **common,
        chosen=_parse_answer(fields.get("chosen"), "chosen", items, where_row, root),
        rejected=_parse_answer(fields.get("rejected"), "rejected", items, where_row, root),
        contrast=None if contrast is None else _parse_side_media(contrast, "contrast", items, where_row, root),
    )


def parse_media_list(media: Any, *, where: str, root: Path) -> tuple[MediaItem, ...]:
    """Check a row's `media`.

    Raises:
        RowError: It is no list, or an item lacks its kind or its file.
    """
    if not isinstance(media, list):
        raise _error(where, f"media = {media!r:.60}", "a list", "list the row's media items")
    return tuple(_parse_media(item, f"{where}, media {n}", root) for n, item in enumerate(media))


def media_of(row: Row) -> Iterator[MediaItem]:
    """All media items of a row, those of both sides and of the contrast included."""
    yield from row.media
    if isinstance(row, PreferenceRow):
        yield from row.chosen.media or ()
        yield from row.rejected.media or ()
        yield from row.contrast or ()


def has_target_media(row: Row) -> bool:
    """Whether an assistant's message that is trained on holds media: what only a model that draws can learn."""
    return any(
        message["role"] == "assistant"
        and message.get("loss") is not False
        and isinstance(message["content"], list)
        and any(item["type"] in MEDIA_KINDS for item in message["content"])
        for message in row.messages
    )


# Every row of a data set passes here, twice. So messages are put together only where they are needed.


def _check_messages(messages: Any, where: str, *, needs_answer: bool) -> None:
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
                "a string, or a list of {'type': 'text', 'text': ...} and items such as {'type': 'image'}",
                "mend the message",
            )
        loss = message.get("loss")
        if loss is not None and not _is_loss(loss, role):
            raise _error(
                f"{where}, message {number}",
                f"loss = {loss!r:.60} on a message of the {role}",
                "true, false or a weight of 0 or more, on the assistant's messages only",
                "mend `loss`, or leave it out",
            )
        if not message.keys() <= MESSAGE_KEYS and (unknown := _unknown_keys(message)):
            raise _error(
                f"{where}, message {number}", f"unknown keys {unknown}", "role, content and loss", "leave them out"
            )
        has_answer |= role == "assistant" and message.get("loss") is not False
    if needs_answer and not has_answer:
        raise _error(
            where, "no message of the assistant to learn from", "at least one that is trained on", "drop the row"
        )


def _is_item_list(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(item, dict)
        and (item.get("type") in MEDIA_KINDS or (item.get("type") == "text" and isinstance(item.get("text"), str)))
        for item in content
    )


def _is_loss(loss: Any, role: str) -> bool:
    is_weight = isinstance(loss, bool | int | float) and 0 <= loss < float("inf")
    return is_weight and (role == "assistant" or not loss)


def _unknown_keys(message: dict[str, Any]) -> list[str]:
    """Keys with a value of None count as absent: Arrow tables add them."""
    return [key for key, value in message.items() if key not in MESSAGE_KEYS and value is not None]


def _parse_media(item: Any, where: str, root: Path) -> MediaItem:
    if not isinstance(item, dict):
        raise _error(where, f"{item!r:.60}", "an object", "write its kind and its path")
    _check_keys(item, MEDIA_KEYS, required=("kind",), where=where)
    kind, path, blob = item["kind"], item.get("path"), item.get("blob")
    if kind not in MEDIA_KINDS:
        raise _error(where, f"kind = {kind!r}", f"one of {', '.join(MEDIA_KINDS)}", "mend the kind")
    if isinstance(blob, Mapping):
        blob = Blob(**{**blob, "container": root / blob["container"]})
    if blob is None and not (isinstance(path, str | Path) and str(path)):
        raise _error(where, f"path = {path!r:.60}", "a file name", "write the file's path, relative to the row file")
    height, width = _size(item, "height", where), _size(item, "width", where)
    if bool(height) != bool(width):
        raise _error(where, f"height, width = {(height, width)}", "both or neither", "write the size in pixels")
    return MediaItem(
        kind=kind,
        path=None if blob is not None else root / str(path),
        height=height,
        width=width,
        frames=_size(item, "frames", where),
        seconds=_seconds(item, "seconds", where) or 0.0,
        start=_seconds(item, "start", where),
        end=_seconds(item, "end", where),
        blob=blob,
    )


def _size(item: dict, key: str, where: str) -> int:
    value = item.get(key)
    if value is None:
        return 0
    if type(value) is not int or value < 1:  # a bool is an int, too
        raise _error(where, f"{key} = {value!r:.60}", "a positive whole number", f"mend the {key}, or leave it out")
    return value


def _seconds(item: dict, key: str, where: str) -> float | None:
    value = item.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise _error(where, f"{key} = {value!r:.60}", "seconds, 0 or more", f"mend `{key}`, or leave it out")
    return float(value)


def _parse_answer(answer: Any, side: str, media: Sequence[MediaItem], where: str, root: Path) -> Answer:
    where = f"{where}, {side}"
    if not isinstance(answer, dict):
        raise _error(where, f"{answer!r:.60}", "an object with `content`", "give both answers")
    _check_keys(answer, ANSWER_KEYS, required=("content",), where=where)
    content = answer["content"]
    if not isinstance(content, str) and not _is_item_list(content):
        raise _error(where, f"content = {content!r:.60}", "a string, or a list of content items", "mend it")
    own = answer.get("media")
    return Answer(content, None if own is None else _parse_side_media(own, "media", media, where, root))


def _parse_side_media(
    media: Any, name: str, shared: Sequence[MediaItem], where: str, root: Path
) -> tuple[MediaItem, ...]:
    items = parse_media_list(media, where=f"{where}, {name}", root=root)
    if [item.kind for item in items] != [item.kind for item in shared]:
        raise _error(
            f"{where}, {name}",
            f"{len(items)} media items",
            f"as many, of the same kinds, as the row has: {len(shared)}",
            "they take the places of the row's own media: give one for each",
        )
    return items


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
