"""Media that lie inside other files: members of a tar, cells of a parquet or Arrow table, images inside an index."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm.data.schema import Blob, MediaItem
from mllm.errors import MediaError

ROW_GROUPS_KEPT = 2
"""Columns of parquet row groups in memory, per process: a row group can only be read as a whole."""


def read_media_bytes(item: MediaItem) -> Path | bytes:
    """What a decoder takes: the path of a file, or the bytes of embedded media.

    Raises:
        MediaError: The bytes are not where the blob says.
    """
    if item.blob is None:
        if item.path is None:
            raise MediaError(f"an {item.kind} item without a file", expected="a path or a blob", do="mend the row")
        return item.path
    return read_blob(item.blob)


def read_blob(blob: Blob) -> bytes:
    """The bytes a blob points at.

    Raises:
        MediaError: The file is gone, shorter than it was, or holds no bytes there.
    """
    try:
        data = _read_cell(blob) if blob.column else _read_range(blob)
    except (OSError, EOFError, LookupError, pa.ArrowException) as error:
        raise _gone(blob, f"{type(error).__name__}: {error}") from error
    if not isinstance(data, bytes):
        raise _gone(blob, f"it holds {type(data).__name__}")
    return data


def _read_range(blob: Blob) -> bytes:
    if blob.offset < 0 or not 0 < blob.length <= blob.container.stat().st_size:
        raise EOFError(f"{blob.length} bytes from byte {blob.offset} on")
    with blob.container.open("rb") as file:
        file.seek(blob.offset)
        data = file.read(blob.length)
    if len(data) != blob.length:
        raise EOFError(f"{len(data)} bytes of {blob.length}")
    return data


def _read_cell(blob: Blob) -> Any:
    if blob.row < 0:
        raise IndexError(f"row {blob.row}")
    path = str(blob.container)
    # A file that was replaced must not be answered from memory.
    stamp = blob.container.stat().st_mtime_ns
    if _is_parquet(path, stamp):
        group, start = _find_group(_open_parquet(path, stamp), blob.row)
        column = _read_group(path, stamp, group, blob.column)
        cell = column[blob.row - start]
    else:
        cell = _open_arrow(path, stamp)[blob.column][blob.row]
    if blob.position >= 0:
        cell = cell.values[blob.position]
    return (cell["bytes"] if isinstance(cell, pa.StructScalar) else cell).as_py()


@lru_cache(maxsize=64)
def _is_parquet(path: str, stamp: int) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


@lru_cache(maxsize=64)
def _open_parquet(path: str, stamp: int) -> pq.ParquetFile:
    return pq.ParquetFile(path, memory_map=True)


@lru_cache(maxsize=64)
def _open_arrow(path: str, stamp: int) -> pa.Table:
    """The table, memory-mapped: nothing is read yet. The file or the stream form (which `datasets` writes)."""
    source = pa.memory_map(path)
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


def _find_group(file: pq.ParquetFile, row: int) -> tuple[int, int]:
    """The row group that holds a row of the file, and the number of its first row."""
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if start <= row < end:
            return group, start
        start = end
    raise IndexError(f"row {row} of {start}")


@lru_cache(maxsize=ROW_GROUPS_KEPT)
def _read_group(path: str, stamp: int, group: int, column: str) -> pa.ChunkedArray:
    return _open_parquet(path, stamp).read_row_group(group, columns=[column], use_threads=False)[column]


def _gone(blob: Blob, problem: str) -> MediaError:
    place = f"column {blob.column!r}, row {blob.row}" if blob.column else f"byte {blob.offset}"
    return MediaError(
        f"{blob.container}, {place}: no media there ({problem})",
        expected="the file as it was when it was indexed",
        do="index the source again: open it with `open_index`, or start the run anew",
    )
