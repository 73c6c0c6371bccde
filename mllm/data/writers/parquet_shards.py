"""Parquet files of a bounded size, in small row groups: a cell costs the reading of its whole group."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GROUP_BYTES = 4 << 20
GROUP_ROWS = 256
MAX_SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class Shard:
    """One file of a set, as the index of the set has it."""

    file: str
    rows: int
    bytes: int


@dataclass
class ParquetShards:
    """Write rows into `STEM-00000.parquet`, `STEM-00001.parquet`, ...; close it, or use it in a `with` statement.

    Args:
        directory: Exists.
        schema: Of the files.
        stem: Beginning of the names.
        max_bytes: Bound of a file; a single row that is longer has a file of its own.
    """

    directory: Path
    schema: pa.Schema
    stem: str = "shard"
    max_bytes: int = MAX_SHARD_BYTES
    shards: list[Shard] = field(default_factory=list)
    _rows: list[Mapping[str, Any]] = field(default_factory=list)
    _num_bytes: int = 0
    _num_rows: int = 0
    _sink: pa.NativeFile | None = None
    _writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "ParquetShards":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        elif self._sink is not None:
            self._sink.close()

    def add(self, cells: Mapping[str, Any], num_bytes: int) -> None:
        """Add a row of about so many bytes."""
        if self._rows and (self._num_bytes + num_bytes > GROUP_BYTES or len(self._rows) >= GROUP_ROWS):
            self._write_group()
        self._rows.append(cells)
        self._num_bytes += num_bytes

    def close(self) -> None:
        """Write what is pending; a set without rows is one file without rows."""
        if self._rows or not (self.shards or self._writer):
            self._write_group()
        self._close_shard()

    def _write_group(self) -> None:
        if self._sink is not None and self._sink.tell() + self._num_bytes > self.max_bytes:
            self._close_shard()
        if self._writer is None:
            name = f"{self.stem}-{len(self.shards):05d}.parquet"
            self._sink = pa.OSFile(str(self.directory / name), "wb")
            self._writer = pq.ParquetWriter(self._sink, self.schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self.schema), row_group_size=GROUP_ROWS)
        self._num_rows += len(self._rows)
        self._rows, self._num_bytes = [], 0

    def _close_shard(self) -> None:
        if self._writer is None or self._sink is None:
            return
        self._writer.close()
        self._sink.close()
        file = self.directory / f"{self.stem}-{len(self.shards):05d}.parquet"
        self.shards.append(Shard(file.name, self._num_rows, file.stat().st_size))
        self._sink, self._writer, self._num_rows = None, None, 0
