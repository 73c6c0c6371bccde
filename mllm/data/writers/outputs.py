"""Files and directories that appear under their names when they are complete, and never replace others."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm.checkpoints import sync
from mllm.errors import OptionError


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill; renamed to its name at the end, removed after an error.

    Raises:
        OptionError: There is something of that name.
    """
    partial = _partial(directory)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            sync(file)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial)
        raise
    sync(directory.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write; renamed to its name at the end, removed after an error.

    Raises:
        OptionError: There is something of that name.
    """
    partial = _partial(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        sync(partial)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json_array(path: Path, objects: Iterable[Any]) -> None:
    """Write a JSON array, an object a line, as a stream."""
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        before = "[\n"
        for item in objects:
            file.write(before + json.dumps(item, ensure_ascii=False))
            before = ",\n"
        file.write("[]\n" if before == "[\n" else "\n]\n")


def write_json_lines(path: Path, objects: Iterable[Any]) -> None:
    """Write JSON Lines as a stream."""
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for item in objects:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


def _partial(path: Path) -> Path:
    if path.exists():
        raise OptionError(f"{path} is there already", expected="a new name", do="remove it, or choose another name")
    return path.with_name(f"{path.name}.partial-{os.getpid()}")
