"""Stream rows from parquet shards, local or remote, for training loops of one's own; see `mllm.data.writers.shards`.

A mixture of indexes is what `train/sft.py` reads: it shuffles better, and needs no streaming for data of any size on a
local disk. A stream is for shards that are not, and cannot be made, local:

    stream = ShardStream("s3://bucket/shards", rank=rank, world_size=world_size)
    loader = StreamLoader(stream, batch_size=8, num_workers=4, collate_fn=...)
    for epoch in range(3):
        for batch in loader:          # goes on to the next epoch when it is through
            ...
            state = loader.state_dict()   # at any batch; `load_state_dict` in a new process goes on behind it
"""

import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mllm.data.importers.base import ImportProblem, Record
from mllm.data.importers.mllm_rows import convert
from mllm.data.left_out import BAD, LeftOut
from mllm.data.quarantine import Bad
from mllm.data.schema import Row, parse_row
from mllm.data.sources import Source
from mllm.data.stream_plan import Block, batches_done, blocks_of, deal_units
from mllm.errors import CheckpointError, OptionError, RowError

BLOCK_UNITS = 8


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A row, and what a decoder takes for each of its media, in the order of `mllm.data.schema.media_of`."""

    row: Row
    media: tuple[Path | bytes, ...]


class ShardStream(IterableDataset):
    """The rows of parquet shards. Over all workers of all ranks every row comes exactly once an epoch.

    Row groups are dealt out anew in each epoch, so a reader's number of rows is not the same as another's: they differ
    by at most the rows of one row group. `StreamLoader` evens out the number of batches.

    Args:
        shards: Files, or one directory of them: paths, or URLs of any kind that fsspec knows.
        transform: Applied in the worker to each `StreamedRow`; a `LeftOut`, for a row that is broken, passes by it.
        seed: With the epoch it decides the order.
        rank: This process.
        world_size: All processes.
        block_units: Row groups whose rows are shuffled together, and held in memory.
        shuffle: Whether to; else rows come in the order of the files, for each reader.
        storage_options: For fsspec, such as credentials; never recorded.

    Raises:
        OptionError: There are no shards, or none with rows.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        *,
        transform: Callable[[StreamedRow], Any] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        block_units: int = BLOCK_UNITS,
        shuffle: bool = True,
        storage_options: dict[str, Any] | None = None,
    ):
        self.transform = transform
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.block_units, self.shuffle = block_units, shuffle
        self.files = _list_shards(shards, storage_options or {})
        self.groups = [(file, group) for file, shard in enumerate(self.files) for group in range(len(shard.sizes))]
        self.sizes = [size for shard in self.files for size in shard.sizes]
        if not sum(self.sizes):
            raise OptionError(f"{shards}: {len(self.files)} shards without rows", expected="rows", do="name others")
        self.epoch = 0
        self.starts: list[int] = []
        """How many rows each worker has served; none for the beginning of an epoch."""
        self.first_worker = 0
        """The worker whose turn is first."""

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        self.epoch, self.starts, self.first_worker = epoch, [], 0

    def readers(self, num_workers: int) -> list[list[list[int]]]:
        """The units of this epoch by rank and worker."""
        dealt = deal_units(
            self.sizes,
            num_readers=self.world_size * num_workers,
            epoch=self.epoch,
            seed=self.seed,
            shuffle=self.shuffle,
        )
        return [dealt[rank * num_workers : (rank + 1) * num_workers] for rank in range(self.world_size)]

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        number, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        worker = (number + self.first_worker) % num_workers
        units = self.readers(num_workers)[self.rank][worker]
        blocks = blocks_of(
            units,
            self.sizes,
            block_units=self.block_units,
            epoch=self.epoch,
            seed=self.seed,
            shuffle=self.shuffle,
        )
        skipped = self.starts[worker] if self.starts else 0
        for block in blocks:
            if skipped < len(block.order):
                yield from self._rows(block, skipped)
            skipped = max(skipped - len(block.order), 0)

    def _rows(self, block: Block, skipped: int) -> Iterator[Any]:
        cells = [row for unit in block.units for row in self._read_unit(unit)]
        for place in block.order[skipped:].tolist():
            row = _streamed(*cells[place])
            yield row if self.transform is None or isinstance(row, LeftOut) else self.transform(row)

    def _read_unit(self, unit: int) -> list[tuple["Shard", int, dict[str, Any]]]:
        """The rows of a row group as cells: their shard, and their number in it."""
        file, group = self.groups[unit]
        shard = self.files[file]
        filesystem, path = shard.place
        with filesystem.open(path, "rb") as opened:
            table = pq.ParquetFile(opened).read_row_group(group, use_threads=False)
        start = sum(shard.sizes[:group])
        return [(shard, start + number, cells) for number, cells in enumerate(table.to_pylist())]


class StreamLoader:
    """Batches of a stream, by as many workers as one likes, with a state that can be saved at any batch.

    One pass serves (the rest of) an epoch and goes on to the next. All ranks serve equally many batches: those that
    are through earlier end with `collate_fn([])`, empty batches that weigh nothing.

    Args:
        stream: What to read.
        batch_size: Rows of a batch; the last one of each worker may be smaller.
        collate_fn: Makes a batch of a list, also of an empty one.
        num_workers: Processes that read; 0 to read in this one.
    """

    def __init__(
        self, stream: ShardStream, *, batch_size: int, collate_fn: Callable[[list[Any]], Any], num_workers: int = 0
    ):
        self.stream = stream
        self.batch_size = batch_size
        self.collate_fn = collate_fn
        self.num_workers = num_workers
        self.emitted = 0

    def __len__(self) -> int:
        """Batches of this epoch, the same on every rank."""
        return max(sum(batches) for batches in self._num_batches())

    def __iter__(self) -> Iterator[Any]:
        total, own = len(self), self._num_batches()[self.stream.rank]
        done, self.stream.first_worker = batches_done(own, self.emitted)
        sizes = self._num_rows()[self.stream.rank]
        self.stream.starts = [min(count * self.batch_size, size) for count, size in zip(done, sizes, strict=True)]
        loader = DataLoader(
            self.stream, batch_size=self.batch_size, collate_fn=self.collate_fn, num_workers=self.num_workers
        )
        for batch in islice(loader, sum(own) - self.emitted if self.emitted < sum(own) else 0):
            self.emitted += 1
            yield batch
        while self.emitted < total:
            self.emitted += 1
            yield self.collate_fn([])
        self.stream.set_epoch(self.stream.epoch + 1)
        self.emitted = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: behind the last batch that was handed out."""
        is_through = self.emitted == len(self)
        place = (self.stream.epoch + 1, 0) if is_through else (self.stream.epoch, self.emitted)
        return {"epoch": place[0], "batches": place[1], **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken.

        Raises:
            CheckpointError: It was taken of other shards, or with other settings: then the order is another.
        """
        now = self._settings()
        if differing := [name for name in now if state.get(name) != now[name]]:
            raise CheckpointError(
                f"the state of a stream with another {', '.join(differing)}",
                expected="the shards and settings that it was taken with",
                do="set them as they were, or begin the stream anew",
            )
        self.stream.set_epoch(state["epoch"])
        self.emitted = state["batches"]

    def _settings(self) -> dict[str, Any]:
        stream = self.stream
        return {
            "sizes": list(stream.sizes),
            "seed": stream.seed,
            "world_size": stream.world_size,
            "num_workers": self.num_workers,
            "batch_size": self.batch_size,
            "block_units": stream.block_units,
            "shuffle": stream.shuffle,
        }

    def _num_rows(self) -> list[list[int]]:
        """Rows of this epoch by rank and worker."""
        ranks = self.stream.readers(max(1, self.num_workers))
        return [[sum(self.stream.sizes[unit] for unit in units) for units in workers] for workers in ranks]

    def _num_batches(self) -> list[list[int]]:
        return [[-(-rows // self.batch_size) for rows in workers] for workers in self._num_rows()]


@dataclass(frozen=True)
class Shard:
    """A parquet file.

    Args:
        url: With its protocol.
        sizes: Rows of each row group.
        storage_options: For its file system.
    """

    url: str
    sizes: tuple[int, ...]
    storage_options: dict[str, Any]

    @property
    def place(self) -> tuple[Any, str]:
        """Its file system, and its path there. Asked for anew: a connection does not survive a fork."""
        return fsspec.core.url_to_fs(self.url, **self.storage_options)


def _list_shards(shards: str | Path | Sequence[str | Path], storage_options: dict[str, Any]) -> list[Shard]:
    found = []
    for given in [shards] if isinstance(shards, str | Path) else shards:
        filesystem, path = fsspec.core.url_to_fs(str(given), **storage_options)
        names = [path]
        if filesystem.isdir(path):
            names = sorted(name for name in filesystem.find(path) if name.endswith(".parquet"))
        if not names or not filesystem.isfile(names[0]):
            raise OptionError(f"{given} is not there, or holds no shards", expected="*.parquet", do="correct the path")
        found += [
            Shard(filesystem.unstrip_protocol(name), _sizes(filesystem, name), storage_options) for name in names
        ]
    return found


def _sizes(filesystem: Any, path: str) -> tuple[int, ...]:
    with filesystem.open(path, "rb") as file:
        metadata = pq.read_metadata(file)
    return tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))


def _streamed(shard: Shard, number: int, cells: dict[str, Any]) -> StreamedRow | LeftOut:
    where = f"{shard.url}, row {number}"
    filesystem, path = shard.place
    directory = posixpath.dirname(path)
    media, items = [], []
    for place, item in enumerate(cells.get("media") or []):
        kept = {key: value for key, value in item.items() if value is not None and key != "bytes"}
        if item["bytes"] is not None:
            kept.pop("path", None)
            kept["blob"] = {"container": path, "column": "media", "row": number, "position": place}
            media.append(item["bytes"])
        else:
            media.append(_media_file(filesystem, posixpath.join(directory, str(item["path"]))))
        items.append(kept)
    record = Record({**cells, "media": items}, where, number)
    try:
        (fields,) = convert(record, Source(shard.url))
        row = parse_row(fields, where=where, root=Path(directory))
    except (ImportProblem, RowError) as problem:
        bad = Bad(str(cells.get("id")), where, "", getattr(problem, "found", str(problem)))
        return LeftOut(-1, BAD, bad, _malformed(where, problem))
    return StreamedRow(row, tuple(media))


def _media_file(filesystem: Any, path: str) -> Path | bytes:
    """What lies beside a local shard is read when it is decoded; beside a remote one, now."""
    return Path(path) if isinstance(filesystem, LocalFileSystem) else filesystem.cat_file(path)


def _malformed(where: str, problem: Exception) -> RowError:
    if isinstance(problem, RowError):
        return problem
    return RowError(f"{where}: {problem}", expected="a row as `write_shards` writes it", do="write the shard again")
