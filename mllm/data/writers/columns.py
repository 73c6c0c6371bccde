"""The columns of our own parquet shards: what `shards.py` writes and the importer `mllm` reads.

| column      | type                       | holds                                                                    |
|-------------|----------------------------|--------------------------------------------------------------------------|
| id          | string                     | `Row.id`                                                                 |
| source      | string                     | `Row.source`                                                             |
| messages    | string                     | JSON: `Row.messages`                                                     |
| media       | list<struct>, see below    | all media of the row: its own first, then those of `chosen`, `rejected`  |
|             |                            | and `contrast`                                                           |
| chosen      | string, null for no answer | JSON: `{"content": ...}`, or `{"content": ..., "media": [3, 4]}`: places |
|             |                            | in the column `media`                                                    |
| rejected    | string, null for no answer | the same                                                                 |
| contrast    | string, null for none      | JSON: `[5]`: places in the column `media`                                |
| coordinates | string, "" for no boxes    | `Row.coordinates`                                                        |
| meta        | string                     | JSON: `Row.meta`                                                         |

The row's own media are those before the first place that `chosen`, `rejected` or `contrast` name; they are as many as
`messages` has media content items.

A media item has `bytes` (the file itself, embedded), or else `path`: relative to the directory of the shard, or
absolute. Beside `bytes`, `path` is the file's former name, for messages alone. Sizes are null where nobody has looked:
`height` and `width` of the upright image or frame in pixels, `frames` and `seconds` of the whole file. `start` and
`end` cut an audio or video file, in seconds; null for its beginning and its end.

The parquet file's own metadata say `mllm_rows: 1`, the version of this table.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from mllm.data.schema import Answer, MediaItem, PreferenceRow, Row

FORMAT_KEY = b"mllm_rows"
VERSION = b"1"

MEDIA = pa.struct(
    {
        "kind": pa.string(),
        "path": pa.string(),
        "bytes": pa.binary(),
        "height": pa.int32(),
        "width": pa.int32(),
        "frames": pa.int32(),
        "seconds": pa.float64(),
        "start": pa.float64(),
        "end": pa.float64(),
    }
)

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "messages": pa.string(),
        "media": pa.list_(MEDIA),
        "chosen": pa.string(),
        "rejected": pa.string(),
        "contrast": pa.string(),
        "coordinates": pa.string(),
        "meta": pa.string(),
    },
    metadata={FORMAT_KEY: VERSION},
)


def cells_of(row: Row, media: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row as cells of `SCHEMA`.

    Args:
        row: The row.
        media: Cells of all its media, in the order of `mllm.data.schema.media_of`; see `media_cell`.
    """
    cells: dict[str, Any] = {
        "id": row.id,
        "source": row.source,
        "messages": _json(row.messages),
        "media": list(media),
        "chosen": None,
        "rejected": None,
        "contrast": None,
        "coordinates": row.coordinates,
        "meta": _json(row.meta),
    }
    if not isinstance(row, PreferenceRow):
        return cells
    place = len(row.media)
    for side, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        cells[side] = _json(_side(answer, place))
        place += len(answer.media or ())
    if row.contrast is not None:
        cells["contrast"] = _json(list(range(place, place + len(row.contrast))))
    return cells


def media_cell(item: MediaItem, *, path: str | None, data: bytes | None) -> dict[str, Any]:
    """One element of the column `media`."""
    return {
        "kind": item.kind,
        "path": path,
        "bytes": data,
        "height": item.height or None,
        "width": item.width or None,
        "frames": item.frames or None,
        "seconds": item.seconds or None,
        "start": item.start,
        "end": item.end,
    }


def _side(answer: Answer, place: int) -> dict[str, Any]:
    if answer.media is None:
        return {"content": answer.content}
    return {"content": answer.content, "media": list(range(place, place + len(answer.media)))}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
