"""Where indexes lie, and whether one is still up to date."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

import mllm.data
from mllm.data.importers import FIRST_RECORDS, detect_format
from mllm.data.importers.base import BadRecord, Importer, Record
from mllm.data.importers.llama_factory_info import info_file
from mllm.data.indexing.content_keys import Stamp, file_digests, hash_of, stamp_of, write_atomically
from mllm.data.indexing.index_build import build_index
from mllm.data.indexing.index_format import VERSION
from mllm.data.reading.read import read_records
from mllm.data.reading.source_files import source_files
from mllm.data.sources import Source
from mllm.errors import OptionError

CHECKED_MEDIA = 20_000
"""Of how many media files, spread evenly, an index is asked whether they are as they were; of the bad ones, all."""

_PARTIAL = ".partial"


def default_cache_dir() -> Path:
    """The directory that MLLM_CACHE names, else `~/.cache/mllm/index`."""
    named = os.environ.get("MLLM_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mllm" / "index"


def media_root_of(source: Source) -> Path:
    """What relative media paths of a source are relative to: `media_root`, or the directory of its files."""
    if source.media_root is not None:
        return Path(source.media_root).absolute()
    path = Path(source.path)
    if path.is_dir():
        return path.absolute()
    return Path(os.path.commonpath([file.parent.absolute() for file in source_files(source)]))


def current_index(
    source: Source, *, cache_dir: Path | None = None, progress: Callable[[int], Any] | None = None
) -> Path:
    """The directory of an index that is up to date; builds one where there is none.

    Raises:
        OptionError: The source cannot be read, or changes meanwhile.
    """
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    home = cache_dir / _request_key(source, cache_dir)
    if (found := _up_to_date(home)) is not None:
        return found
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(str(home / "lock")):
        if (found := _up_to_date(home)) is not None:  # built by somebody else while we waited
            return found
        return _build(source, home, cache_dir, progress)


def _request_key(source: Source, cache_dir: Path) -> str:
    """What an index is made of: content, options, code. Paths count, because rows say where they were found."""
    place = str(Path(source.path).absolute()) if "://" not in str(source.path) else str(source.path)
    manifest = cache_dir / "files" / f"{hash_of([place, source.subset, source.split, source.revision])[:32]}.json"
    digests = file_digests(_files_read(source), manifest=manifest)
    options = {
        name: getattr(source, name) for name in ("format", "name", "subset", "split", "revision", "coordinates")
    }
    tables = {name: dict(getattr(source, name)) for name in ("remap", "columns", "options")}
    root = str(media_root_of(source))
    return hash_of([VERSION, _code_digest(), place, root, options, tables, sorted(digests.items())])[:32]


def _files_read(source: Source) -> list[Path]:
    """The files of a source, and the one that describes them."""
    info = info_file(source)
    return [file.absolute() for file in dict.fromkeys([*source_files(source), *([info] if info else [])])]


@cache
def _code_digest() -> str:
    """Of everything in `mllm.data`: whoever mends an importer must not be served what it made before."""
    root = Path(mllm.data.__file__).parent
    return hash_of([(str(path.relative_to(root)), path.read_text("utf-8")) for path in sorted(root.rglob("*.py"))])


def _up_to_date(home: Path) -> Path | None:
    try:
        directory = home / (home / "current").read_text(encoding="utf-8")
    except OSError:
        return None
    return directory if (directory / "index.json").is_file() and _media_unchanged(directory) else None


def _media_unchanged(directory: Path) -> bool:
    """Whether media files are still those that were measured, and bad ones have not been mended."""
    table = pa.ipc.open_file(pa.memory_map(str(directory / "media.arrow"))).read_all()
    step = table.num_rows // CHECKED_MEDIA + 1
    is_bad = pc.not_equal(table["problem"], "").to_numpy()
    chosen = table.select(["path", "stamp"]).take(np.flatnonzero(is_bad | (np.arange(table.num_rows) % step == 0)))
    stamps = chosen["stamp"].to_pylist()
    return all(map(_has_stamp, chosen["path"].to_pylist(), stamps))


def _has_stamp(path: str, stamp: Stamp | None) -> bool:
    try:
        return stamp_of(path) == stamp
    except (OSError, ValueError):
        return stamp is None


def _build(source: Source, home: Path, cache_dir: Path, progress: Callable[[int], Any] | None) -> Path:
    """Build in a directory that is renamed when it is complete; the caller holds the lock."""
    for rest in home.glob(f"*{_PARTIAL}"):  # of a build that was interrupted
        shutil.rmtree(rest)
    files = _files_read(source)
    before = [stamp_of(file) for file in files]
    name = f"index-{time.time_ns()}"
    partial = home / f"{name}{_PARTIAL}"
    partial.mkdir()
    try:
        records, importer = _recognised(source)
        build_index(records, importer, source, media_root=media_root_of(source), directory=partial, progress=progress)
        if [stamp_of(file) for file in files] != before:
            raise OptionError(
                f"data: {source.path} changed while it was read",
                expected="files that nobody writes to",
                do="start again when they are complete",
            )
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(home / name)
    _replace_current(home, name)
    return home / name


def _replace_current(home: Path, name: str) -> None:
    """Name the index in use. The one before stays, for whoever still reads it; older ones go."""
    current = home / "current"
    former = current.read_text(encoding="utf-8") if current.exists() else ""
    write_atomically(current, name.encode())
    for directory in home.glob("index-*"):
        if directory.name not in (name, former):
            shutil.rmtree(directory)


def _recognised(source: Source) -> tuple[Iterator[Record | BadRecord], Importer]:
    """All records, and the importer that the first of them ask for."""
    records = read_records(source)
    first: list[Record | BadRecord] = []
    good: list[Record] = []
    while len(good) < FIRST_RECORDS and len(first) < 100 * FIRST_RECORDS:
        if (record := next(records, None)) is None:
            break
        first.append(record)
        if isinstance(record, Record):
            good.append(record)
    if first and not good and not source.format:
        return iter(first), _NOTHING  # nothing can be read; the list says why
    return chain(first, records), detect_format(good, source)


_NOTHING = Importer("", "no record can be read", matches=lambda fields, source: False, convert=lambda *_: ())
