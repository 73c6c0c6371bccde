"""Parquet and Arrow files as records; embedded media are found, and never decoded."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mllm.data.importers.base import BadRecord, EmbeddedBytes, Record

BATCH_BYTES = 16 << 20
MAX_BATCH_ROWS = 1024

MEDIA_STRUCT = {"bytes", "path", "sampling_rate"}
"""Fields of the struct that `datasets` stores an image, a sound or a video as."""

Decoder = Callable[[Any], Any]


def read_parquet(path: Path, *, number: int = 0) -> Iterator[Record | BadRecord]:
    """Read a parquet file a part of a row group at a time; a row group that is damaged is one `BadRecord`.

    A null is an absent value: keys that hold none are left out, on all levels, since Arrow gives every struct of a
    column the keys of all of them. A binary value becomes `EmbeddedBytes`; so does a struct of `bytes` and `path`, or
    the path where it has no bytes.
    """
    try:
        file = pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        yield BadRecord(str(path), f"no readable parquet file: {_first_line(error)}", number)
        return
    with file:
        reader = _RowReader(path, file.schema_arrow)
        end = 0
        for index in range(file.num_row_groups):
            group = file.metadata.row_group(index)
            row, end = end, end + group.num_rows
            size = _batch_rows(group.total_byte_size, group.num_rows)
            try:
                for batch in file.iter_batches(size, row_groups=[index]):
                    yield from reader.records(batch, row, number + row)
                    row += len(batch)
            except (pa.ArrowException, OSError) as error:
                yield _damaged(path, row, end, error, number)


def read_arrow(path: Path, *, number: int = 0) -> Iterator[Record | BadRecord]:
    """Read an Arrow IPC file or stream, as `read_parquet` does; the files of `datasets` are streams."""
    row = 0
    reader: _RowReader | None = None
    try:
        with pa.memory_map(str(path)) as source:
            for batch in _ipc_batches(source):
                reader = reader or _RowReader(path, batch.schema)
                size = _batch_rows(batch.nbytes, len(batch))
                for start in range(0, len(batch), size):
                    part = batch.slice(start, size)
                    yield from reader.records(part, row, number + row)
                    row += len(part)
    except (pa.ArrowException, OSError) as error:
        yield BadRecord(f"{path}, from row {row} on", f"damaged: {_first_line(error)}", number + row)


def _ipc_batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source)
        for index in range(file.num_record_batches):
            yield file.get_batch(index)
    else:
        source.seek(0)
        yield from pa.ipc.open_stream(source)


class _RowReader:
    """Makes records of the batches of one file."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.path = path
        self.columns = schema.names
        self.decoders = [_column_decoder(str(path), field) for field in schema]

    def records(self, batch: pa.RecordBatch, row: int, number: int) -> Iterator[Record]:
        """The rows of a batch whose first is row `row` of the file."""
        columns = [column.to_pylist() for column in batch.columns]
        for offset in range(len(batch)):
            fields = {}
            for name, decode, column in zip(self.columns, self.decoders, columns, strict=True):
                value = column[offset]
                if value is not None and (value := decode(value, row + offset)) is not None:
                    fields[name] = value
            yield Record(fields, f"{self.path}, row {row + offset}", number + offset)


def _column_decoder(path: str, field: pa.Field) -> Callable[[Any, int], Any]:
    """What makes a Python value of a column's cell, given its row."""
    kind = field.type
    is_list = _is_list(kind)
    decode = _decoder(kind.value_type if is_list else kind) or _as_is

    def cell(row: int, position: int) -> dict[str, Any]:
        return {"container": path, "column": field.name, "row": row, "position": position}

    if not _holds_bytes(kind.value_type if is_list else kind):
        whole = _decoder(kind) or _as_is
        return lambda value, row: whole(value)
    if is_list:
        return lambda values, row: [_located(decode(value), cell(row, place)) for place, value in enumerate(values)]
    return lambda value, row: _located(decode(value), cell(row, -1))


def _decoder(kind: pa.DataType) -> Decoder | None:
    """What makes a Python value of one that Arrow gives, None included; None for nothing to do."""
    if isinstance(kind, pa.BaseExtensionType):
        return _json if kind.extension_name == "arrow.json" else None
    if _is_binary(kind):
        return lambda value: value if value is None else EmbeddedBytes(value)
    if _is_list(kind):
        inner = _decoder(kind.value_type)
        return inner and (lambda values: values if values is None else [inner(value) for value in values])
    if pa.types.is_struct(kind):
        return _struct_decoder(kind)
    return None


def _struct_decoder(kind: pa.StructType) -> Decoder:
    decoders = {field.name: _decoder(field.type) or _as_is for field in kind}
    is_media = _holds_bytes(kind) and decoders.keys() <= MEDIA_STRUCT

    def decode(value: Any) -> Any:
        if value is None:
            return None
        found = {key: decoders[key](item) for key, item in value.items() if item is not None}
        if isinstance(data := found.get("bytes"), EmbeddedBytes) and isinstance(found.get("path"), str):
            found["bytes"] = replace(data, name=found["path"])
        return found.get("bytes", found.get("path")) if is_media else found

    return decode


def _located(value: Any, blob: dict[str, Any]) -> Any:
    """A media item, or a struct with one under `bytes`, that knows its place in the table."""
    if isinstance(value, EmbeddedBytes):
        return replace(value, blob=blob)
    if isinstance(value, dict) and isinstance(value.get("bytes"), EmbeddedBytes):
        value["bytes"] = replace(value["bytes"], blob=blob)
    return value


def _json(text: Any) -> Any:
    return text if text is None else json.loads(text)


def _as_is(value: Any) -> Any:
    return value


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a value is binary, or a struct with a binary field `bytes`."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _batch_rows(num_bytes: int, num_rows: int) -> int:
    """How many rows make a batch of a bounded size."""
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * max(num_rows, 1) // max(num_bytes, 1)))


def _damaged(path: Path, row: int, end: int, error: Exception, number: int) -> BadRecord:
    return BadRecord(f"{path}, rows {row} to {end - 1}", f"damaged: {_first_line(error)}", number + row)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
