"""The work of a recipe: read, convert, check, look for the media, write; everything that is left out is counted."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm.checkpoints import atomic_directory
from mllm.data.importers.base import BadRecord, Drop, EmbeddedBytes, Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import LEFT_OUT
from mllm.data.indexing.index_cache import media_root_of
from mllm.data.indexing.index_format import body_of, text_bytes
from mllm.data.indexing.media_paths import MediaPaths, PathProblem
from mllm.data.indexing.row_parser import converted, id_of
from mllm.data.quarantine import Bad, Quarantine, check_quarantine
from mllm.data.reading.read import read_records
from mllm.data.reading.source_files import source_files
from mllm.data.schema import Row, has_target_media, parse_row
from mllm.data.sources import Source
from mllm.data.writers.shards import write_shards
from mllm.errors import OptionError, RowError

Records = Iterable[Record | BadRecord]

ON_MISSING = ("error", "drop", "keep")
MISSING = "a media file is missing"
SHARDS = "shards"
EMBEDDED = "embedded"
"""Folder for media that stood inside the published file; each is named by its content, so none is written twice."""

SUFFIXES = {
    ".png": (0, b"\x89PNG"),
    ".jpg": (0, b"\xff\xd8\xff"),
    ".gif": (0, b"GIF8"),
    ".webp": (8, b"WEBP"),
    ".wav": (8, b"WAVE"),
    ".flac": (0, b"fLaC"),
}
"""By the bytes at a place near the beginning: names in published files say too often what is not so."""


@dataclass(frozen=True)
class Build:
    """What `build_rows` is to do.

    Args:
        source: The published files; where their media lie; what becomes of bad records.
        importer: Of the published form.
        out: Directory to write.
        facts: What `recipe.json` says beside the counts.
        limit: Rows to stop after; None for all.
        on_missing: What becomes of a row with a media file that is not there: "error" (it is bad), "drop" or "keep".
        embed: Whether to write parquet shards that hold the media, in place of JSONL that names them.
        prefixes: Prefixes of media paths to count by; other paths count under their first folder.
        change: Changes the stream of records.
    """

    source: Source
    importer: Importer
    out: Path
    facts: Mapping[str, Any]
    limit: int | None = None
    on_missing: str = "error"
    embed: bool = False
    prefixes: tuple[str, ...] = ()
    change: Callable[[Records], Records] = iter


def build_rows(build: Build) -> dict[str, Any]:
    """Write `rows.jsonl` (or `shards/`), a `mixture.yaml` that names it, and `recipe.json` with all counts.

    The directory appears when it is whole. Where bad records are an error, the list of them stays beside it.

    Returns:
        What `recipe.json` holds.

    Raises:
        CheckpointError: The directory exists.
        MllmError: Bad records are an error, or there are too many.
        OptionError: The published file is not there, or makes no row.
    """
    files = source_files(build.source)
    listed = build.out.with_name(f"{build.out.name}.quarantine.jsonl")
    with atomic_directory(build.out, kind="data") as partial:
        quarantine = Quarantine(listed)
        try:
            with closing(quarantine), closing(_Builder(build, partial, quarantine)) as builder:
                builder.run()
        finally:
            if not quarantine.num_rows:
                listed.unlink()
        check_quarantine(listed, build.source, num_bad=quarantine.num_rows, num_good=builder.counts["rows"])
        if not builder.counts["rows"]:
            raise OptionError(
                f"{build.source.path}: no row of {builder.counts['records']} records; {dict(builder.dropped)}",
                expected=f"{build.importer.name}: {build.importer.about}",
                do="see --help for the files of this recipe",
            )
        if build.embed:
            _embed(partial, builder.paths)
        if quarantine.num_rows:
            listed.rename(partial / "quarantine.jsonl")
        facts = {**build.facts, **builder.facts(quarantine.num_rows), "hashes": [_hash(file) for file in files]}
        (partial / "recipe.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        mixture = yaml.safe_dump({"sources": [_entry(build, builder.has_embedded)]}, sort_keys=False)
        (partial / "mixture.yaml").write_text(mixture, encoding="utf-8")
    return facts


class _Builder:
    """The open files of a recipe's directory, and the counts."""

    def __init__(self, build: Build, directory: Path, quarantine: Quarantine):
        self.build, self.directory, self.quarantine = build, directory, quarantine
        self.paths = MediaPaths(media_root_of(build.source), build.source.remap)
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.media: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.missing_paths: set[str] = set()
        self.has_embedded = False
        self.files = ExitStack()
        self.rows = self.files.enter_context((directory / "rows.jsonl").open("w", encoding="utf-8"))

    def close(self) -> None:
        self.files.close()
        if self.missing_paths:
            names = "".join(f"{path}\n" for path in sorted(self.missing_paths))
            (self.directory / "missing.txt").write_text(names, encoding="utf-8")

    def run(self) -> None:
        for record in self.build.change(read_records(self.build.source)):
            self.counts["records"] += 1
            for fields in self._convert(record):
                self._take(fields, record)
                if self.counts["rows"] == self.build.limit:
                    return

    def facts(self, num_bad: int) -> dict[str, Any]:
        """The counts, as `recipe.json` has them."""
        return {
            **{key: self.counts[key] for key in ("records", "rows")},
            "bad": num_bad,
            "dropped": dict(self.dropped),
            "left_out": dict(self.left_out),
            "rows_with_target_media": self.counts["rows_with_target_media"],
            "media": dict(self.media),
            "missing_media": dict(self.missing),
            "limit": self.build.limit,
        }

    def _convert(self, record: Record | BadRecord) -> list[Fields]:
        if isinstance(record, BadRecord):
            self.quarantine.add(Bad("", record.where, "", record.reason))
            return []
        try:
            return converted(record, self.build.importer, self.build.source)
        except Drop as drop:
            self.dropped[str(drop)] += 1
        except ImportProblem as problem:
            self.quarantine.add(Bad(id_of(record), record.where, "", str(problem)))
        return []

    def _take(self, fields: Fields, record: Record | BadRecord) -> None:
        """Check a row, count it and its media, and write it, or say why not."""
        self.left_out.update(fields.get("meta", {}).pop(LEFT_OUT, {}))
        try:
            row = parse_row(_without_bytes(fields), where=record.where, root=Path(self.paths.root))
            text_bytes(row), body_of(row)  # half of a surrogate pair, which no file takes
            items = list(_media_fields(fields))
            missing = [path for item in items if "path" in item and not self._is_there(path := item["path"])]
        except (RowError, PathProblem) as error:
            reason = error.found if isinstance(error, RowError) else str(error)
            self.quarantine.add(Bad(str(fields.get("id", "")), record.where, "", reason))
            return
        for item in items:
            self.media[f"{item['kind']} {self._prefix(item)}"] += 1
        self.missing.update(f"{self._prefix({'path': path})}" for path in missing)
        self.missing_paths.update(missing)
        if missing and self.build.on_missing == "drop":
            self.dropped[MISSING] += 1
        elif missing:
            self.quarantine.add(*(Bad(row.id, record.where, path, "the file is not there") for path in missing))
        else:
            self._write(fields, row, items)

    def _write(self, fields: Fields, row: Row, items: list[Fields]) -> None:
        for item in items:
            if "bytes" in item:
                item["path"] = self._extract(item.pop("bytes"))
        self.rows.write(json.dumps(fields, ensure_ascii=False) + "\n")
        self.counts["rows"] += 1
        self.counts["rows_with_target_media"] += has_target_media(row)

    def _extract(self, embedded: EmbeddedBytes) -> str:
        """Write embedded media under a name made of its content; returns the path relative to the directory."""
        name = hashlib.sha256(embedded.data).hexdigest()[:32]
        suffix = next((suffix for suffix, (at, head) in SUFFIXES.items() if embedded.data.startswith(head, at)), "")
        path = self.directory / EMBEDDED / name[:2] / f"{name}{suffix or os.path.splitext(embedded.name)[1]}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(embedded.data)
        self.has_embedded = True
        return path.relative_to(self.directory).as_posix()

    def _is_there(self, path: str) -> bool:
        resolved = self.paths.resolve(path)  # a path that leaves the media root is bad, whatever `on_missing` says
        return self.build.on_missing == "keep" or os.path.exists(resolved)

    def _prefix(self, item: Fields) -> str:
        if "path" not in item:
            return EMBEDDED
        known = [prefix for prefix in self.build.prefixes if item["path"].startswith(prefix)]
        return max(known, key=len) if known else item["path"].rpartition("/")[0].partition("/")[0] or "."


def _embed(directory: Path, paths: MediaPaths) -> None:
    """Make shards of the rows and their media, in place of the JSONL and of media that were written beside it."""
    file = directory / "rows.jsonl"
    write_shards(_located_rows(file, paths), directory / SHARDS, embed=True)
    file.unlink()
    shutil.rmtree(directory / EMBEDDED, ignore_errors=True)


def _located_rows(file: Path, paths: MediaPaths) -> Iterator[Row]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            fields = json.loads(line)
            for item in _media_fields(fields):
                is_beside = item["path"].startswith(f"{EMBEDDED}/")
                item["path"] = str(file.parent / item["path"]) if is_beside else paths.resolve(item["path"])
            yield parse_row(fields, where=f"{file}, line {number}", root=file.parent)


def _media_fields(fields: Fields) -> Iterator[Fields]:
    yield from fields.get("media") or ()
    for side in ("chosen", "rejected"):
        yield from (fields.get(side) or {}).get("media") or ()
    yield from fields.get("contrast") or ()


def _without_bytes(value: Any) -> Any:
    """Fields as `parse_row` takes them: embedded media named, as if they were files."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), EmbeddedBytes):
            return {key: item for key, item in value.items() if key != "bytes"} | {"path": EMBEDDED}
        return {key: _without_bytes(item) for key, item in value.items()}
    return [_without_bytes(item) for item in value] if isinstance(value, list) else value


def _entry(build: Build, has_embedded: bool) -> dict[str, Any]:
    """The rows as an entry of a mixture; media that lay inside the published file now lie beside the rows."""
    source = build.source
    path = SHARDS if build.embed else "rows.jsonl"
    entry: dict[str, Any] = {"path": path, "format": "mllm", "name": source.name, "licence": source.licence}
    if not (has_embedded or build.embed):
        entry |= {"media_root": str(media_root_of(source))}
        entry |= {"remap": dict(source.remap)} if source.remap else {}
    return entry


def _hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
