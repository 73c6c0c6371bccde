"""Write an index: read a source once, check its rows, look at its media, keep what is good and list what is not."""

import gc
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from mllm.data.importers.base import BadRecord, Drop, Fields, Importer, ImportProblem, Record
from mllm.data.indexing.index_format import OWN_MEDIA, SCHEMA, VERSION, RowTable, content_buffers
from mllm.data.indexing.media_paths import MediaPaths
from mllm.data.indexing.media_probes import MediaProbes, Probed
from mllm.data.indexing.row_parser import BadRow, Parsed, RowParser, converted, id_of
from mllm.data.quarantine import Bad, Quarantine
from mllm.data.sources import Source

CHUNK_ROWS = 2048
CHUNK_BYTES = 32 * 2**20
"""Rows are written when so many of them, or so much of their text, are in memory."""

MEDIA_SCHEMA = pa.schema(
    {
        "kind": pa.string(),
        "path": pa.string(),
        "problem": pa.string(),
        "format": pa.string(),
        "notes": pa.list_(pa.string()),
        "stamp": pa.list_(pa.int64()),  # null where the file could not even be asked for its size
    }
)


def build_index(
    records: Iterable[Record | BadRecord],
    importer: Importer,
    source: Source,
    *,
    media_root: Path,
    directory: Path,
    progress: Callable[[int], Any] | None = None,
) -> None:
    """Fill a directory with `rows.arrow`, `media.arrow`, `media.bin` where needed, `quarantine.jsonl`, `index.json`.

    Rows and the entries of the list stand in the order of the source. Memory holds one chunk of rows, and the facts of
    the media files.

    Args:
        records: Of the source.
        importer: Makes rows of them.
        source: Handed to the importer.
        media_root: What relative media paths are relative to.
        directory: Exists and is empty.
        progress: Told how many more records have been read.
    """
    paths = MediaPaths(media_root, source.remap)
    with _no_collection_of_cycles(), _Builder(importer, source, paths, directory) as builder:
        for number, record in enumerate(records, start=1):
            builder.take(record)
            if number % CHUNK_ROWS == 0 and progress:
                progress(CHUNK_ROWS)
        builder.finish()
        if progress:
            progress(builder.num_records % CHUNK_ROWS)


@contextmanager
def _no_collection_of_cycles() -> Iterator[None]:
    """Rows make no cycles, but millions of objects: looking for cycles among them took a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Builder:
    """The open files of an index, and the rows on their way into them."""

    def __init__(self, importer: Importer, source: Source, paths: MediaPaths, directory: Path):
        self.directory = directory
        self.num_records = self.num_rows = 0
        self.dropped: Counter[str] = Counter()
        self._importer, self._source = importer, source
        self._parser = RowParser(paths, directory / OWN_MEDIA)
        self._shorten, self._media_root = paths.shortened, paths.root
        self._pending: list[Parsed | tuple[Bad, ...]] = []
        self._pending_bytes = 0
        self._hash = hashlib.sha256()
        self._media: list[dict[str, Any]] = []
        self._probes = MediaProbes(self._note_media)
        self._files = ExitStack()
        self._quarantine = self._files.enter_context(closing(Quarantine(directory / "quarantine.jsonl")))
        self._files.callback(self._probes.close)
        self._files.callback(self._parser.close)
        self._rows_file, self._media_file = (
            self._files.enter_context(pa.ipc.new_file(str(directory / name), schema))
            for name, schema in (("rows.arrow", SCHEMA), ("media.arrow", MEDIA_SCHEMA))
        )

    def __enter__(self) -> "_Builder":
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def take(self, record: Record | BadRecord) -> None:
        """Make rows of a record."""
        self.num_records += 1
        if isinstance(record, BadRecord):
            self._pending.append((Bad("", record.where, "", record.reason),))
            return
        try:
            rows = converted(record, self._importer, self._source)
        except Drop as drop:
            self.dropped[str(drop)] += 1
            return
        except ImportProblem as problem:
            self._pending.append((Bad(id_of(record), record.where, "", str(problem)),))
            return
        for fields in rows:
            self._add(fields, record)

    def _add(self, fields: Fields, record: Record) -> None:
        try:
            parsed = self._parser.parse(fields, record)
        except BadRow as problem:
            self._pending.append(problem.bad)
            return
        for item, data in zip(parsed.items, parsed.embedded, strict=True):
            if data is not None:
                self._probes.put(item, data)
        parsed.embedded = []
        self._pending.append(parsed)
        self._pending_bytes += len(parsed.body)
        if len(self._pending) >= CHUNK_ROWS or self._pending_bytes >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Look at the media of the pending rows, and write what is good."""
        parsed = [entry for entry in self._pending if isinstance(entry, Parsed)]
        self._probes.look_at(item for entry in parsed for item in entry.items)
        table = RowTable(self._shorten)
        for entry in self._pending:
            bad = entry if isinstance(entry, tuple) else self._measure(entry)
            if bad:
                self._quarantine.add(*bad)
            elif isinstance(entry, Parsed):
                table.add(entry.row, entry.items, number=entry.number, body=entry.body, num_bytes=entry.num_bytes)
        self._pending, self._pending_bytes = [], 0
        self._probes.forget_if_many()
        if len(table):
            batch = table.batch()
            for buffer in content_buffers(batch):
                self._hash.update(buffer)
            self._rows_file.write_batch(batch)
            self.num_rows += len(table)
        if self._media:
            self._media_file.write_batch(pa.RecordBatch.from_pylist(self._media, schema=MEDIA_SCHEMA))
            self._media = []

    def _measure(self, entry: Parsed) -> tuple[Bad, ...]:
        """Fill in the sizes of a row's media; what is wrong with them."""
        bad = []
        for place, (item, name) in enumerate(zip(entry.items, entry.names, strict=True)):
            entry.items[place], problem = self._probes.measured(item)
            if problem:
                bad.append(Bad(entry.row.id, entry.row.where, name, problem))
        return tuple(bad)

    def _note_media(self, kind: str, path: str, probed: Probed) -> None:
        values = (kind, path, probed.problem, probed.facts.format, list(probed.facts.notes), probed.stamp)
        self._media.append(dict(zip(MEDIA_SCHEMA.names, values, strict=True)))

    def finish(self) -> None:
        """Write what is pending, and at last the file that says what there is."""
        self._flush()
        self._files.close()
        facts = {
            "version": VERSION,
            "key": self._hash.hexdigest(),
            "importer": self._importer.name,
            "media_root": self._media_root,
            "num_records": self.num_records,
            "num_rows": self.num_rows,
            "num_bad": self._quarantine.num_rows,
            "dropped": self.dropped,
        }
        (self.directory / "index.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
