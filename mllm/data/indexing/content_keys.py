"""Names for the content of files, without reading a file again that has not changed since it was last read."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WHOLE = 8 * 2**30
"""Files up to this size are hashed as a whole; of a longer one its size, its time, and blocks all over it."""
_BLOCK = 2**22
_SETTLED = 2_000_000_000
"""Nanoseconds after its last change during which a file's time does not vouch for its content: clocks are coarse."""

Stamp = list[int]


def stamp_of(path: str | Path) -> Stamp:
    """What changes when a file is edited, replaced or touched: size, times of change, inode."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def file_digests(paths: Sequence[Path], *, manifest: Path) -> dict[str, str]:
    """The hash of each file's content, by its path.

    Args:
        paths: The files.
        manifest: Where stamps and hashes are remembered: a file with the stamp it had when it was hashed is not read.

    Raises:
        OSError: A file cannot be read.
    """
    known = _read_manifest(manifest)
    with ThreadPoolExecutor(max_workers=4) as threads:
        entries = dict(zip(map(str, paths), threads.map(lambda path: _entry(path, known), paths), strict=True))
    if entries != known:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(manifest, json.dumps(entries).encode())
    return {path: entry["sha256"] for path, entry in entries.items()}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file as a whole or not at all."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def hash_of(value: Any) -> str:
    """A hash of anything JSON can say; other objects by their `repr`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def _read_manifest(manifest: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(manifest.read_bytes())
    except (OSError, ValueError):
        return {}


def _entry(path: Path, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    before = stamp_of(path)
    entry = known.get(str(path))
    if entry and entry["stamp"] == before and entry["is_settled"]:
        return entry
    now = time.time_ns()
    digest = _digest(path, before)
    return {"stamp": before, "sha256": digest, "is_settled": max(before[1], before[2]) + _SETTLED < now}


def _digest(path: Path, stamp: Stamp) -> str:
    with path.open("rb") as file:
        if stamp[0] <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(json.dumps(stamp[:2]).encode())
        for place in range(65):
            file.seek(place * (stamp[0] - _BLOCK) // 64)
            digest.update(file.read(_BLOCK))
        return digest.hexdigest()
