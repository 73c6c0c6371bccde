"""How rows lie in an index: the columns of its Arrow file, and the way there and back."""

import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mllm.data.schema import MEDIA_KINDS, Answer, Blob, MediaItem, PreferenceRow, Row
from mllm.errors import RowError

VERSION = 1
OWN_MEDIA = Path("media.bin")
"""The file inside the index for bytes that lie nowhere by themselves. As the only relative path it stands for itself
in a `Blob` on its way into the index, where an empty path stands for it."""

_MEDIA = pa.schema(
    {
        "kind": pa.int8(),  # place in MEDIA_KINDS
        "path": pa.string(),  # of the file, or of the blob's container; relative where it lies under the media root
        "height": pa.int32(),
        "width": pa.int32(),
        "frames": pa.int32(),
        "seconds": pa.float64(),
        "start": pa.float64(),
        "end": pa.float64(),
        "is_blob": pa.bool_(),
        "offset": pa.int64(),
        "length": pa.int64(),
        "column": pa.string(),
        "row": pa.int64(),
        "position": pa.int32(),
    }
)
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "number": pa.int64(),  # of the record, in the published file
        "where": pa.string(),
        "body": pa.large_binary(),  # JSON: all other keys of the row, and how many media each side has of its own
        "num_bytes": pa.int32(),  # UTF-8, of all texts
        "num_nfc_bytes": pa.int32(),  # the same behind Unicode normalisation, where that makes them longer
        "num_messages": pa.int32(),
        "has_boxes": pa.bool_(),  # in a form that `coordinates` declares
        "media": pa.list_(pa.struct(list(_MEDIA))),  # in the order of `media_of`
    }
)
_PLACES = ("number", "where")  # columns that say where a row was found, not what it is


def text_bytes(row: Row) -> tuple[int, int]:
    """UTF-8 bytes of all texts of a row, those of both answers included; and behind NFC, if that is longer.

    Raises:
        RowError: A text holds half of a surrogate pair, which no file and no tokenizer takes.
    """
    contents = [message["content"] for message in row.messages]
    if isinstance(row, PreferenceRow):
        contents += [row.chosen.content, row.rejected.content]
    plain = composed = 0
    try:
        if not (row.id.isascii() and row.source.isascii()):
            (row.id + row.source).encode()
        for content in contents:
            for text in (content,) if isinstance(content, str) else _texts(content):
                if text.isascii():
                    plain += len(text)
                    composed += len(text)
                else:
                    num_bytes = len(text.encode())
                    plain += num_bytes
                    composed += max(num_bytes, _num_nfc_bytes(text))
    except UnicodeEncodeError as error:
        problem = "half of a surrogate pair in a text"
        raise RowError(f"{row.name}: {problem}", expected="Unicode text", do="drop the row") from error
    return plain, composed


def _num_nfc_bytes(text: str) -> int:
    return 0 if unicodedata.is_normalized("NFC", text) else len(unicodedata.normalize("NFC", text).encode())


def _texts(content: list[dict[str, Any]]) -> Iterator[str]:
    return (item["text"] for item in content if item["type"] == "text")


class RowTable:
    """Rows on their way into a record batch.

    Args:
        shorten: Makes a resolved media path relative to the media root where that is possible.
    """

    def __init__(self, shorten: Callable[[str], str]):
        self._shorten = shorten
        self._rows: list[tuple[Any, ...]] = []
        self._media: list[tuple[Any, ...]] = []
        self._media_ends = [0]

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self, row: Row, items: Sequence[MediaItem], *, number: int, body: bytes, num_bytes: tuple[int, int]
    ) -> None:
        """Add a row.

        Args:
            row: The row.
            items: Its media in the order of `media_of`, sizes filled in; those of `row` are not looked at.
            number: Of its record.
            body: See `body_of`.
            num_bytes: See `text_bytes`.
        """
        lengths = (*num_bytes, len(row.messages), bool(row.coordinates))
        self._rows.append((row.id, row.source, number, row.where, body, *lengths))
        self._media += map(self._media_values, items)
        self._media_ends.append(len(self._media))

    def _media_values(self, item: MediaItem) -> tuple[Any, ...]:
        kind, blob = MEDIA_KINDS.index(item.kind), item.blob
        frames = min(item.frames, 2**31 - 1)  # a header may lie
        sizes = (item.height, item.width, frames, item.seconds, item.start, item.end)
        if blob is None:
            return (kind, self._shorten(str(item.path)), *sizes, False, -1, -1, "", -1, -1)
        cell = (blob.offset, blob.length, blob.column, blob.row, blob.position)
        container = "" if blob.container == OWN_MEDIA else self._shorten(str(blob.container))
        return (kind, container, *sizes, True, *cell)

    def batch(self) -> pa.RecordBatch:
        """All rows so far."""
        media = [
            pa.array(values, field) for values, field in zip(_columns(self._media, _MEDIA), _MEDIA.types, strict=True)
        ]
        items = pa.StructArray.from_arrays(media, fields=list(_MEDIA))
        schema = SCHEMA.remove(SCHEMA.get_field_index("media"))
        columns = [
            pa.array(values, field) for values, field in zip(_columns(self._rows, schema), schema.types, strict=True)
        ]
        columns.append(pa.ListArray.from_arrays(pa.array(self._media_ends, pa.int32()), items))
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _columns(lines: list[tuple[Any, ...]], schema: pa.Schema) -> Iterable[Sequence[Any]]:
    return zip(*lines, strict=True) if lines else [()] * len(schema)


def body_of(row: Row) -> bytes:
    """All that has no column of its own, as JSON.

    Raises:
        RowError: JSON in UTF-8 cannot say it.
    """
    body: dict[str, Any] = {"messages": row.messages}
    if row.meta:
        body["meta"] = row.meta
    if row.coordinates:
        body["coordinates"] = row.coordinates
    if isinstance(row, PreferenceRow):
        body["chosen"] = _side(row.chosen)
        body["rejected"] = _side(row.rejected)
        if row.contrast is not None:
            body["contrast"] = len(row.contrast)
    try:
        return _ENCODER.encode(body).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise RowError(f"{row.name}: {error}", expected="what JSON in UTF-8 can say", do="mend the row") from error


# Other values than those of JSON, such as the times of a table, become words; only `meta` can hold any.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str)


def _side(answer: Answer) -> dict[str, Any]:
    return {"content": answer.content, "media": None if answer.media is None else len(answer.media)}


def content_buffers(batch: pa.RecordBatch) -> Iterator[pa.Buffer]:
    """The memory of a batch that was just made, without the columns of places: what the rows' hash is made of."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name not in _PLACES:
            yield from (buffer for buffer in column.buffers() if buffer is not None)


class BatchRows:
    """A record batch, read row by row.

    Args:
        batch: As `RowTable.batch` made it.
        root: The media root.
        directory: The index, which may hold media of its own.
    """

    def __init__(self, batch: pa.RecordBatch, root: Path, directory: Path):
        self._texts = [batch.column(name) for name in ("id", "source", "where", "body")]
        self._ends = batch.column("media").offsets.to_numpy()
        items = batch.column("media").values
        names = [name for name in _MEDIA.names if name not in ("path", "column")]
        # Cells of a numpy array are read several times faster than those of an Arrow array.
        self._numbers = {name: items.field(name).to_numpy(zero_copy_only=False) for name in names}
        self._paths, self._blob_columns = items.field("path"), items.field("column")
        self._root = root
        self._directory = directory

    def __getitem__(self, place: int) -> Row:
        row_id, source, where, body = (column[place].as_py() for column in self._texts)
        fields = json.loads(body)
        start, end = int(self._ends[place]), int(self._ends[place + 1])
        items = map(self._item, range(start, end))
        chosen, rejected, contrast = (fields.get(key) for key in ("chosen", "rejected", "contrast"))
        sides = [side and side["media"] for side in (chosen, rejected)] + [contrast]
        common = {
            "id": row_id,
            "source": source,
            "messages": fields["messages"],
            "media": _take(items, end - start - sum(count or 0 for count in sides)),
            "where": where,
            "meta": fields.get("meta") or {},
            "coordinates": fields.get("coordinates") or "",
        }
        if chosen is None:
            return Row(**common)
        return PreferenceRow(
            **common,
            chosen=Answer(chosen["content"], None if sides[0] is None else _take(items, sides[0])),
            rejected=Answer(rejected["content"], None if sides[1] is None else _take(items, sides[1])),
            contrast=None if contrast is None else _take(items, contrast),
        )

    def _item(self, place: int) -> MediaItem:
        number = {name: column[place].item() for name, column in self._numbers.items()}
        path = self._paths[place].as_py()
        blob = None
        if number["is_blob"]:
            container = self._root / path if path else self._directory / OWN_MEDIA
            column = self._blob_columns[place].as_py()
            blob = Blob(container, number["offset"], number["length"], column, number["row"], number["position"])
        start, end = (None if math.isnan(number[name]) else number[name] for name in ("start", "end"))
        return MediaItem(
            kind=MEDIA_KINDS[number["kind"]],
            path=None if blob else self._root / path,
            height=number["height"],
            width=number["width"],
            frames=number["frames"],
            seconds=number["seconds"],
            start=start,
            end=end,
            blob=blob,
        )


def _take(items: Iterator[MediaItem], count: int) -> tuple[MediaItem, ...]:
    return tuple(next(items) for _ in range(count))


def column_of(batches: Sequence[pa.RecordBatch], name: str) -> np.ndarray:
    """A column of numbers over all batches."""
    parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in batches]
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def media_columns(batches: Sequence[pa.RecordBatch], *names: str) -> tuple[np.ndarray, ...]:
    """Columns of the media of all rows, one value an item; the first is the item's row."""
    rows, columns, start = [], [], 0
    for batch in batches:
        media = batch.column("media")
        rows.append(np.repeat(np.arange(start, start + batch.num_rows), np.diff(media.offsets.to_numpy())))
        columns.append([media.values.field(name).to_numpy(zero_copy_only=False) for name in names])
        start += batch.num_rows
    if not rows:
        return tuple(np.empty(0, np.int64) for _ in range(len(names) + 1))
    return np.concatenate(rows), *(np.concatenate(parts) for parts in zip(*columns, strict=True))
