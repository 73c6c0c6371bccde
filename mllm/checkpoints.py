"""Directories that are either complete or not there: checkpoints, assembled models, exports, data sets."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm.errors import CheckpointError
from mllm.version import __version__

COMPLETE = "complete.json"


@contextmanager
def atomic_directory(target: str | Path, *, kind: str, facts: dict[str, Any] | None = None) -> Iterator[Path]:
    """Write a directory as one step: it appears under its name with everything in it, or not at all.

    The caller fills the yielded `NAME.partial-PID`. `complete.json` (`kind`, `facts`) is written last, then all is
    synced to disk and renamed. On an exception the partial directory is removed; after a kill it stays under its own
    name, which nothing reads.

    Raises:
        CheckpointError: `target` exists already.
    """
    target = Path(target)
    refuse_existing(target)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        mark_complete(partial, kind=kind, facts=facts)
        refuse_existing(target)
        partial.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def mark_complete(directory: Path, *, kind: str, facts: dict[str, Any] | None = None) -> None:
    """Sync every file below `directory`, then write and sync its `complete.json`."""
    for path in sorted(directory.rglob("*")):
        sync(path)
    record = {"kind": kind, "mllm": __version__, **(facts or {})}
    (directory / COMPLETE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sync(directory / COMPLETE)
    sync(directory)


def refuse_existing(target: Path) -> None:
    """Raise CheckpointError when `target` exists: nothing is ever overwritten or mixed."""
    if target.exists():
        raise CheckpointError(
            f"{target} exists already",
            expected="a name that is not taken",
            do="choose another output directory, or move or delete this one yourself",
        )


def is_complete(directory: str | Path, *, kind: str | None = None) -> bool:
    """Whether `directory` was finished (and is of this `kind`, where one is named)."""
    record = read_complete(directory)
    return record is not None and (kind is None or record.get("kind") == kind)


def read_complete(directory: str | Path) -> dict[str, Any] | None:
    """The content of `complete.json`, or None where the directory was never finished."""
    path = Path(directory) / COMPLETE
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk before anything else is done."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
