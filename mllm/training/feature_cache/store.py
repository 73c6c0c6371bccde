"""Features on disk: files of views of one size, which grow at their end, and lists of what they hold.

A space has a directory of shards, each written by one process and never changed afterwards. A shard is two files:

    NAME.features   view behind view, in the machine's own (little-endian) order of bytes
    NAME.index      one line of JSON that says what the views are; then a record of 36 bytes for each: key and checksum

A record is written when its view is on the disk, so what a killed process leaves behind is whole as far as its index
goes, and any number of processes can fill one directory. Nothing is unpickled.
"""

import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mllm.checkpoints import sync
from mllm.errors import CheckpointError, OptionError
from mllm.shapes import Float, Tensor
from mllm.training.feature_cache.key import FORMAT, FeatureSpace

RECORD = np.dtype([("key", "V32"), ("checksum", "<u4")])
COMMIT_BYTES = 64 * 2**20
COMMIT_SECONDS = 10.0
"""Items are put on record after so many bytes or seconds: what a kill may cost."""

INGREDIENTS = "space.json"
Place = tuple[int, int]
"""The numbers of a shard, and of a view in it."""


class FeatureStore:
    """The features of one space, to be read.

    What other processes write meanwhile is seen after `refresh`.

    Args:
        directory: Of the cache.
        space: Of the features.

    Raises:
        CheckpointError: A shard is damaged.
    """

    def __init__(self, directory: Path, space: FeatureSpace):
        self.directory = directory / space.name
        self.space = space
        self.shards: list[Path] = []
        self.places: dict[bytes, Place] = {}
        self._checksums: list[np.ndarray] = []
        self._maps: dict[int, np.ndarray] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        # To a worker that is spawned go neither open files nor the keys, by which nobody looks any more.
        return {**self.__dict__, "_maps": {}, "places": {}}

    def refresh(self) -> None:
        """Read the lists of all shards again."""
        self.places, self._checksums, self._maps = {}, [], {}
        self.shards = sorted(self.directory.glob("*.index"))
        for number, path in enumerate(self.shards):
            records = _read_index(path, self.space)
            self._checksums.append(records["checksum"].copy())
            for row, key in enumerate(records["key"].tolist()):
                self.places.setdefault(key, (number, row))

    def forget_keys(self) -> None:
        """Free the memory of the keys, where all places that will be asked for are known."""
        self.places = {}

    def read(self, place: Place, into: Float[Tensor, "L D_encoder"]) -> None:
        """Copy one view's features from the disk.

        Raises:
            CheckpointError: They are not what was written.
        """
        shard, row = place
        size = self.space.view_bytes
        if shard not in self._maps:
            self._maps[shard] = np.memmap(_features_of(self.shards[shard]), dtype=np.uint8, mode="r")
        data = self._maps[shard][row * size : (row + 1) * size]
        if zlib.crc32(data.data) != self._checksums[shard][row]:
            raise _damaged(_features_of(self.shards[shard]), f"view {row} is not what was written there")
        into.view(torch.uint8).numpy().reshape(-1)[:] = data


class ShardWriter:
    """A shard of one's own, made when the first view comes; leave it to put the last views on record.

    Args:
        directory: Of the cache.
        space: Of the features.
    """

    def __init__(self, directory: Path, space: FeatureSpace):
        self.directory = directory / space.name
        self.space = space
        self._files: tuple[FileIO, FileIO] | None = None
        self._waiting: list[tuple[bytes, int]] = []
        self._last_commit = time.monotonic()
        self._is_broken = False

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._files is None:
            return
        if not self._is_broken:
            self.commit()
        for file in self._files:
            file.close()
        sync(self.directory)

    def add(self, keys: list[bytes], features: Float[Tensor, "N L D_encoder"]) -> None:
        """Write some views' features.

        Raises:
            OptionError: The disk is full, or fails.
        """
        for key, view in zip(keys, features.detach().cpu().contiguous(), strict=True):
            data = memoryview(view.view(torch.uint8).numpy().reshape(-1))
            with self._explained():
                _write(self._open()[0], data)
            self._waiting.append((key, zlib.crc32(data)))
        waiting = len(self._waiting) * self.space.view_bytes
        if waiting >= COMMIT_BYTES or time.monotonic() - self._last_commit > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Have all views on the disk, then put them on record.

        Raises:
            OptionError: The disk is full, or fails.
        """
        with self._explained():
            for file, data in zip(self._open(), (b"", np.array(self._waiting, RECORD).tobytes()), strict=True):
                _write(file, memoryview(data))
                os.fsync(file.fileno())
        self._waiting = []
        self._last_commit = time.monotonic()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._is_broken = True
            raise OptionError(
                f"feature_cache: {self.directory} cannot be written ({error.strerror or error})",
                expected="a disk with room for the features of all media of the run",
                do="make room, and start the same run again: it goes on with what is missing",
            ) from error

    def _open(self) -> tuple[FileIO, FileIO]:
        if self._files is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            _describe(self.directory, self.space)
            index = self.directory / f"{uuid.uuid4().hex}.index"
            # Without a buffer: what closing would still write must not follow a write that failed.
            self._files = _features_of(index).open("xb", buffering=0), index.open("xb", buffering=0)
            _write(self._files[1], memoryview(json.dumps(_header(self.space)).encode() + b"\n"))
        return self._files


def _write(file: FileIO, data: memoryview) -> None:
    """All of it: one call may write less, as when the disk is nearly full."""
    while data:
        data = data[file.write(data) :]


def _features_of(index: Path) -> Path:
    return index.with_suffix(".features")


def _header(space: FeatureSpace) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "space": space.name,
        "shape": [space.num_tokens, space.width],
        "dtype": str(space.dtype),
    }


def _describe(directory: Path, space: FeatureSpace) -> None:
    """Say in words what the directory's name is a hash of, for people."""
    path = directory / INGREDIENTS
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex}")
    partial.write_text(json.dumps(space.ingredients, indent=2, default=repr) + "\n", encoding="utf-8")
    partial.replace(path)


def _read_index(path: Path, space: FeatureSpace) -> np.ndarray:
    """The records of a shard; half a record at the end, which is just being written or was never finished, is none."""
    data = path.read_bytes()
    line, end, records = data.partition(b"\n")
    if not end:
        return np.empty(0, RECORD)
    try:
        header = json.loads(line)
    except ValueError as error:
        raise _damaged(path, "its first line is no JSON") from error
    if header != _header(space):
        raise _damaged(path, f"it says that it holds {header}, not {_header(space)}")
    found = np.frombuffer(records, RECORD, count=len(records) // RECORD.itemsize)
    features = _features_of(path)
    size = features.stat().st_size if features.is_file() else 0
    if size < len(found) * space.view_bytes:
        raise _damaged(features, f"{size:,} bytes for {len(found)} views of {space.view_bytes:,}")
    return found


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"feature cache: {path}: {problem}",
        expected="the file as it was written",
        do=f"delete {path.with_suffix('.index')} and {path.with_suffix('.features')}; what they held is encoded anew",
    )
