"""Parquet that `datasets` loads and TRL trains on: `messages`, or `prompt`, `chosen`, `rejected`, beside `images`.

Every content is a list of parts, also where it is one text, for a column has one type. Rows without images have an
empty list: TRL looks at the first row alone to find out whether there are images.

Not said: audio and video (TRL's collators take images), images in an assistant's message, media of one side of a
preference, media in an answer of a preference, and `loss` of a message (TRL's `assistant_only_loss` is one switch for
all). Answers and pairs make two data sets, so rows of the other kind than the first are not said either. Lost: `meta`,
`coordinates`, contrast media.
"""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm.data.schema import Answer, MediaItem, PreferenceRow, Row
from mllm.data.writers.llama_factory import OTHER_KIND, SIDE_MEDIA
from mllm.data.writers.outputs import new_directory
from mllm.data.writers.parquet_shards import MAX_SHARD_BYTES, ParquetShards
from mllm.data.writers.report import Report, Unsayable, say_all
from mllm.data.writers.shards import media_bytes
from mllm.data.writers.strings import check_losses, note_lost

_PARTS = pa.list_(pa.struct({"type": pa.string(), "text": pa.string()}))
_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": _PARTS}))
_IMAGES = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))

# The same as `datasets` writes it: without this, images would load as structs of bytes.
_STRING = {"dtype": "string", "_type": "Value"}
_LIST_OF_PARTS = {"feature": {"type": _STRING, "text": _STRING}, "_type": "List"}
_LIST_OF_MESSAGES = {"feature": {"role": _STRING, "content": _LIST_OF_PARTS}, "_type": "List"}
_LIST_OF_IMAGES = {"feature": {"_type": "Image"}, "_type": "List"}


def write_trl(
    rows: Iterable[Row],
    out: Path,
    *,
    embed: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_unsayable: str = "error",
) -> Report:
    """Write a directory of parquet files, for `datasets.load_dataset("parquet", data_dir=out)`.

    Args:
        rows: To write; all of them answers, or all of them preferences.
        out: The directory; it must not exist.
        embed: Whether images go into the files; else their absolute paths do.
        max_shard_bytes: Bound of a file.
        on_unsayable: "error", or "skip" to leave out and count what this form cannot say.

    Raises:
        MediaError: An image cannot be read.
        OptionError: The directory exists.
        RowError: A row cannot be said.
    """
    report = Report()
    sayer = _Sayer(report, embed=embed)
    said = say_all(rows, sayer.say, report, on_unsayable=on_unsayable)
    first = next(said, None)
    schema = _schema(["prompt", "chosen", "rejected"] if sayer.is_preference else ["messages"])
    with (
        new_directory(out) as directory,
        ParquetShards(directory, schema, stem="train", max_bytes=max_shard_bytes) as shards,
    ):
        for cells in chain(() if first is None else (first,), said):
            shards.add(cells, _num_bytes(cells))
    report.files += [out / shard.file for shard in shards.shards]
    return report


class _Sayer:
    """Says rows of the kind of the first one."""

    def __init__(self, report: Report, *, embed: bool):
        self.is_preference: bool | None = None
        self._report = report
        self._embed = embed

    def say(self, row: Row) -> dict[str, Any]:
        """The cells of a row."""
        is_preference = isinstance(row, PreferenceRow)
        if self.is_preference not in (None, is_preference):
            raise Unsayable(OTHER_KIND)
        if any(item.kind != "image" for item in row.media):
            raise Unsayable("audio or video")
        check_losses(row)
        messages = [_message(message) for message in row.messages]
        cells: dict[str, Any] = {"id": row.id, "source": row.source}
        if isinstance(row, PreferenceRow):
            cells |= {"prompt": messages, "chosen": _side(row.chosen), "rejected": _side(row.rejected)}
        else:
            cells["messages"] = messages
        cells["images"] = [self._image(item) for item in row.media]
        self.is_preference = is_preference
        note_lost(row, self._report)
        return cells

    def _image(self, item: MediaItem) -> dict[str, Any]:
        if item.path is not None and not self._embed:
            return {"bytes": None, "path": str(item.path.absolute())}
        return {"bytes": media_bytes(item), "path": item.path.name if item.path is not None else None}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    parts = _parts(message["content"])
    if message["role"] == "assistant" and any(part["type"] != "text" for part in parts):
        raise Unsayable("images in an assistant's message")
    return {"role": message["role"], "content": parts}


def _side(answer: Answer) -> list[dict[str, Any]]:
    if answer.media is not None:
        raise Unsayable(SIDE_MEDIA)
    parts = _parts(answer.content)
    if any(part["type"] != "text" for part in parts):
        raise Unsayable("media in an answer of a preference")
    return [{"role": "assistant", "content": parts}]


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{"type": item["type"], "text": item.get("text")} for item in content]


def _schema(columns: list[str]) -> pa.Schema:
    fields = {"id": pa.string(), "source": pa.string(), "images": _IMAGES, **dict.fromkeys(columns, _MESSAGES)}
    features = {"id": _STRING, "source": _STRING, "images": _LIST_OF_IMAGES}
    features |= dict.fromkeys(columns, _LIST_OF_MESSAGES)
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _num_bytes(cells: dict[str, Any]) -> int:
    messages = [message for key, value in cells.items() if key not in ("id", "source", "images") for message in value]
    texts = sum(len(part["text"] or "") for message in messages for part in message["content"])
    return texts + sum(len(image["bytes"] or b"") for image in cells["images"])
