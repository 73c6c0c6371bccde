"""From a published record to checked rows whose media are found, but not yet looked at."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mllm.data.importers.base import Drop, EmbeddedBytes, Fields, Importer, ImportProblem, Record
from mllm.data.indexing.index_format import OWN_MEDIA, body_of, text_bytes
from mllm.data.indexing.media_paths import MediaPaths, PathProblem
from mllm.data.quarantine import Bad
from mllm.data.schema import Blob, MediaItem, Row, media_of, parse_row
from mllm.data.sources import Source
from mllm.errors import OptionError, RowError

_MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError)


class BadRow(Exception):
    """A row that is left out."""

    def __init__(self, *bad: Bad):
        super().__init__(*bad)
        self.bad = bad


@dataclass(slots=True)
class Parsed:
    """A checked row.

    Args:
        row: The row; its own media have no sizes yet.
        items: Its media, in the order of `media_of`; sizes are filled in here.
        names: What the source calls each of them.
        embedded: The bytes of those that are embedded.
        number: Of its record.
        body: See `body_of`.
        num_bytes: See `text_bytes`.
    """

    row: Row
    items: list[MediaItem]
    names: list[str]
    embedded: list[bytes | None]
    number: int
    body: bytes
    num_bytes: tuple[int, int]


def converted(record: Record, importer: Importer, source: Source) -> list[Fields]:
    """What an importer makes of a record; all of it or nothing.

    Raises:
        Drop: It is left out on purpose.
        ImportProblem: It is not of the importer's form.
    """
    try:
        rows = list(importer.convert(record, source))
    except (ImportProblem, Drop, OptionError):  # a wrong option is wrong for every record
        raise
    except _MALFORMED as error:  # what an importer that reads on trust trips over
        problem = f"{type(error).__name__}: {error!s:.200}; expected a record of the form {importer.name!r}"
        raise ImportProblem(problem) from error
    for fields in rows:
        if isinstance(fields, dict):  # what the source says of all its rows, where they do not say otherwise
            fields["source"] = fields.get("source") or source.name or Path(str(source.path)).stem
            fields["coordinates"] = fields.get("coordinates") or source.coordinates
    return rows


def id_of(record: Record) -> str:
    """The id of a record that cannot be converted, as far as it has one."""
    found = record.fields.get("id", "") if isinstance(record.fields, Mapping) else ""
    return str(found) if isinstance(found, str | int) else ""


class RowParser:
    """Check the rows that importers yield, and find their media.

    Args:
        paths: Resolves media paths.
        own_media: The file for bytes that lie nowhere by themselves; made when the first of them comes.
    """

    def __init__(self, paths: MediaPaths, own_media: Path):
        self._paths = paths
        self._root = Path(paths.root)
        self._own_media = own_media
        self._own_file: BinaryIO | None = None

    def close(self) -> None:
        """Close the file of bytes."""
        if self._own_file is not None:
            self._own_file.close()

    def parse(self, fields: Fields, record: Record) -> Parsed:
        """Check one row.

        Raises:
            BadRow: With everything that is wrong.
        """
        media = _MediaOfRow(self)
        located = media.located(fields)
        row_id = str(fields["id"]) if isinstance(fields, dict) and "id" in fields else id_of(record)
        if media.problems:
            raise BadRow(*(Bad(row_id, record.where, name, reason) for name, reason in media.problems))
        try:
            row = parse_row(located, where=record.where, root=self._root)
            num_bytes, body = text_bytes(row), body_of(row)
        except RowError as error:
            raise BadRow(Bad(row_id, record.where, "", _reason(error, fields, record.where))) from error
        return Parsed(row, list(media_of(row)), media.names, media.embedded, record.number, body, num_bytes)

    def keep(self, data: bytes) -> Blob:
        """Write bytes into the index's own file."""
        if self._own_file is None:
            self._own_file = self._own_media.open("wb")
        offset = self._own_file.tell()
        self._own_file.write(data)
        return Blob(OWN_MEDIA, offset, len(data))

    def path(self, published: str) -> str:
        """A media path on this machine."""
        return self._paths.resolve(published)


class _MediaOfRow:
    """The media of one row, in the order of `media_of`."""

    def __init__(self, parser: RowParser):
        self._parser = parser
        self.names: list[str] = []
        self.embedded: list[bytes | None] = []
        self.problems: list[tuple[str, str]] = []

    def located(self, fields: Any) -> Any:
        """The row with resolved paths, and blobs in place of bytes. What is malformed is left to `parse_row`."""
        if not isinstance(fields, dict):
            return fields
        located = fields | {"media": self._list(fields.get("media"))}
        for side in ("chosen", "rejected"):
            if isinstance(answer := fields.get(side), dict):
                located[side] = answer | {"media": self._list(answer.get("media"))} if "media" in answer else answer
        if "contrast" in fields:
            located["contrast"] = self._list(fields["contrast"])
        return located

    def _list(self, media: Any) -> Any:
        return [self._item(item) for item in media] if isinstance(media, list) else media

    def _item(self, item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        data, path, blob = item.get("bytes"), item.get("path"), item.get("blob")
        name = str(path or f"media {len(self.names)}")
        if isinstance(data, EmbeddedBytes):
            name = data.name or name
        self.names.append(name)
        self.embedded.append(data.data if isinstance(data, EmbeddedBytes) else None)
        kept = {key: value for key, value in item.items() if key not in ("bytes", "path", "blob")}
        try:
            if isinstance(data, EmbeddedBytes):
                return kept | {"blob": self._blob(data)}
            if blob is not None:
                return kept | {"blob": self._published_blob(blob)}
            if isinstance(path, str | Path) and str(path):
                return kept | {"path": self._parser.path(str(path))}
        except PathProblem as problem:
            self.problems.append((name, str(problem)))
        return item

    def _blob(self, data: EmbeddedBytes) -> Blob:
        if data.blob is None:
            return self._parser.keep(data.data)
        return Blob(**{**data.blob, "container": Path(os.path.abspath(data.blob["container"]))})

    def _published_blob(self, blob: Any) -> Blob:
        """A place that a row itself names, rather than the reader of its file."""
        if not isinstance(blob, Mapping) or not isinstance(blob.get("container"), str):
            raise PathProblem(f"blob = {blob!r:.60}; expected an object with `container`, and where in it")
        kinds = {"offset": int, "length": int, "column": str, "row": int, "position": int}
        rest = {key: value for key, value in blob.items() if key != "container"}
        if wrong := [key for key, value in rest.items() if type(value) is not kinds.get(key)]:
            raise PathProblem(f"blob with {', '.join(map(repr, wrong))}; expected the keys of `Blob`, of their types")
        return Blob(Path(self._parser.path(blob["container"])), **rest)


def _reason(error: RowError, fields: Any, where: str) -> str:
    """The message without the place, which stands beside it in the list."""
    found, row_id = error.found, fields.get("id") if isinstance(fields, dict) else None
    for place in (f"{where}, row {row_id!r}", f"row {str(row_id)!r} ({where})", where):
        found = found.removeprefix(place)
    return f"{found.lstrip(':, ')}; expected {error.expected}"
