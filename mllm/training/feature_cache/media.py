"""The media of a run: which rows show which, each counted once, and what their files hold."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.blobs import read_media_bytes
from mllm.data.examples import Examples
from mllm.data.indexing.content_keys import hash_of, stamp_of, write_atomically
from mllm.data.schema import MediaItem
from mllm.errors import MediaError
from mllm.processing import containers, images
from mllm.processing.files import media_name, open_file

MANIFESTS = "contents"
"""Directory in a cache: what files held when they were last read, so that unchanged ones are not read again."""

SETTLED_NS = 2_000_000_000
"""After its last change a file's time does not vouch for its content for so long: clocks are coarse."""
_THREADS = 4

MAX_BYTES = {"image": images.MAX_BYTES, "audio": containers.MAX_BYTES, "video": containers.MAX_BYTES}
"""As the decoders have it."""


@dataclass(frozen=True)
class RunMedia:
    """The media of all rows that a run may train on.

    Args:
        items: Each medium once, in order of appearance.
        rows: For each item, the position in the mixture of the first row that shows it.
        numbers: Of the items that rows show, row by row.
        starts: For each position in the mixture, where its row's items begin in `numbers`; -1 for rows not used.
    """

    items: list[MediaItem]
    rows: np.ndarray
    numbers: np.ndarray
    starts: np.ndarray

    def numbers_of(self, position: int, count: int) -> np.ndarray:
        """The numbers of the items of the row at this position, which has `count` of them."""
        start = int(self.starts[position])
        return self.numbers[start : start + count]


@dataclass(frozen=True)
class Content:
    """What a medium's file held.

    Args:
        sha256: Of the bytes that a decoder gets.
        stamp: Of the file when they were read, by which one sees that it is as it was; None where it may not be yet.
    """

    sha256: bytes
    stamp: list[int] | None


def find_media(examples: Examples, *, progress: Callable[..., Any] | None = None) -> RunMedia:
    """Go through all rows that are used, and count the media. A file that many rows show is one item."""
    known: dict[MediaItem, int] = {}
    rows: list[int] = []
    numbers: list[int] = []
    starts = np.full(len(examples.rows), -1, np.int64)
    for position in examples.used.tolist():
        starts[position] = len(numbers)
        for item in examples.media_of(position):
            number = known.setdefault(item, len(known))
            if number == len(rows):
                rows.append(position)
            numbers.append(number)
        if progress:
            progress()
    return RunMedia(list(known), np.array(rows, np.int64), np.array(numbers, np.int64), starts)


def open_medium(item: MediaItem) -> Path | bytes:
    """What a decoder gets of a medium: the bytes of an image or of an embedded medium, or else the file.

    Raises:
        MediaError: They are not there.
    """
    source = read_media_bytes(item)
    if isinstance(source, bytes) or item.kind != "image":
        return source
    with _readable(source, item.kind) as file:
        return file.read()


def sha256_of(item: MediaItem, source: Path | bytes) -> bytes:
    """SHA-256 of all bytes that a decoder gets.

    Args:
        item: The medium.
        source: As `open_medium` gave it.

    Raises:
        MediaError: The file cannot be read.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    with _readable(source, item.kind) as file:
        return hashlib.file_digest(file, "sha256").digest()


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[BufferedReader]:
    name = media_name(kind, path, "")
    try:
        with open_file(path, name, max_bytes=MAX_BYTES[kind]) as file:
            yield file
    except OSError as error:
        raise MediaError(f"{name} cannot be read ({error})", expected="a readable file", do="mend it") from error


def contents_of(
    items: Sequence[MediaItem], known: dict[str, Content], *, progress: Callable[..., Any] | None = None
) -> list[Content | MediaError]:
    """What each medium's file holds, or why that cannot be told.

    Args:
        items: The media.
        known: Of earlier runs; of a file with the same stamp the content is not read again.
        progress: Called once a medium.
    """

    def read(number: int) -> Content | MediaError:
        try:
            return _read(items[number])
        except MediaError as error:
            return error
        finally:
            if progress:
                progress()

    found: list[Content | MediaError | None] = [_as_known(item, known) for item in items]
    unknown = [number for number, content in enumerate(found) if content is None]
    if progress:
        progress(len(items) - len(unknown))
    # Neighbours may lie in one row group of a table, which one reader keeps at hand.
    num_threads = 1 if any(items[number].blob is not None for number in unknown) else _THREADS
    with ThreadPoolExecutor(max_workers=num_threads) as threads:
        contents = threads.map(read, unknown)
        return [next(contents) if content is None else content for content in found]


def address_of(item: MediaItem) -> str:
    """Where a medium's bytes lie, as a text."""
    if item.blob is None:
        return str(item.path)
    blob = item.blob
    return json.dumps([str(blob.container), blob.offset, blob.length, blob.column, blob.row, blob.position])


def manifest_path(directory: Path, examples: Examples) -> Path:
    """Where a cache remembers the contents of these rows' media."""
    sources = [(source["sha256"], source["take"]) for source in examples.rows.fingerprints()]
    return directory / MANIFESTS / f"{hash_of(sources)[:32]}.json"


def read_manifest(path: Path) -> dict[str, Content]:
    """What `write_manifest` wrote; nothing where there is nothing that can be read."""
    try:
        entries = json.loads(path.read_bytes())
        return {address: Content(bytes.fromhex(digest), stamp) for address, (digest, stamp) in entries.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_manifest(path: Path, items: Sequence[MediaItem], contents: Sequence[Content | MediaError]) -> None:
    """Remember contents whose stamps can be relied on."""
    entries = {
        address_of(item): [content.sha256.hex(), content.stamp]
        for item, content in zip(items, contents, strict=True)
        if isinstance(content, Content) and content.stamp is not None
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(entries).encode())


def _as_known(item: MediaItem, known: dict[str, Content]) -> Content | None:
    content = known.get(address_of(item)) if known else None
    return content if content is not None and content.stamp == _stamp(item) else None


def _read(item: MediaItem) -> Content:
    before, now = _stamp(item), time.time_ns()
    sha256 = sha256_of(item, open_medium(item))
    is_settled = before is not None and max(before[1], before[2]) + SETTLED_NS < now and _stamp(item) == before
    return Content(sha256, before if is_settled else None)


def _stamp(item: MediaItem) -> list[int] | None:
    """Of a medium's file; None where there is none, and whoever reads it says why."""
    file = item.path if item.blob is None else item.blob.container
    try:
        return None if file is None else stamp_of(file)
    except (OSError, ValueError):
        return None
