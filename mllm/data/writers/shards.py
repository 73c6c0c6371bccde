"""Our own parquet shards, which say all that rows say: see `columns.py`. Read again by the form `mllm`."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mllm.data.blobs import read_media_bytes
from mllm.data.schema import MediaItem, Row, media_of
from mllm.data.writers.columns import SCHEMA, cells_of, media_cell
from mllm.data.writers.media_files import MediaFiles
from mllm.data.writers.outputs import new_directory
from mllm.data.writers.parquet_shards import MAX_SHARD_BYTES, ParquetShards
from mllm.data.writers.report import Report
from mllm.errors import MediaError

INDEX = "_shards.json"
"""Beside the shards: how many rows there are, by file and by source. Nothing needs it to read them."""


def write_shards(
    rows: Iterable[Row],
    out: Path,
    *,
    embed: bool,
    media_root: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Report:
    """Write a directory of shards, which appears when it is complete.

    Args:
        rows: To write.
        out: The directory; it must not exist.
        embed: Whether media files go into the shards; else their paths do. What is embedded already stays so.
        media_root: What paths are relative to, and the `media_root` to read them with; the directory by default.
        max_shard_bytes: Bound of a shard.

    Raises:
        MediaError: A file to embed cannot be read.
        OptionError: The directory exists.
    """
    report, sources = Report(), Counter[str]()
    files = MediaFiles(media_root or out)
    with new_directory(out) as directory:
        with ParquetShards(directory, SCHEMA, max_bytes=max_shard_bytes) as shards:
            for row in rows:
                media = [_cell(item, files, embed=embed) for item in media_of(row)]
                cells = cells_of(row, media)
                shards.add(cells, _num_bytes(cells))
                sources[row.source] += 1
                report.written += 1
        index = {"rows": report.written, "sources": sources, "shards": [asdict(shard) for shard in shards.shards]}
        (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    report.files += [out / shard.file for shard in shards.shards]
    return report


def _cell(item: MediaItem, files: MediaFiles, *, embed: bool) -> dict[str, Any]:
    if item.path is not None and not embed:
        return media_cell(item, path=files.shortened(item.path), data=None)
    return media_cell(item, path=item.path.name if item.path is not None else None, data=media_bytes(item))


def media_bytes(item: MediaItem) -> bytes:
    """The content of a media item's file, wherever it lies.

    Raises:
        MediaError: It cannot be read.
    """
    data = read_media_bytes(item)
    if isinstance(data, bytes):
        return data
    try:
        return data.read_bytes()
    except OSError as error:
        raise MediaError(
            f"the {item.kind} {str(data)!r}: {error.strerror}", expected="a readable file", do="mend the path"
        ) from error


def _num_bytes(cells: dict[str, Any]) -> int:
    texts = sum(len(value) for value in cells.values() if isinstance(value, str))
    return texts + sum(len(item["bytes"] or b"") for item in cells["media"])
