"""The index of a source: its rows checked, converted and measured once, then memory-mapped.

In the cache directory lies a directory for every state of a source, named by a hash of its files' content, its options
and the code that reads it. Inside, `current` names the index in use. An index is written beside it and renamed when it
is complete: a directory without a suffix is a whole index, and an interrupted build leaves nothing that is taken for
one. Several processes may open a source at once: one builds, the others wait for it.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mllm.data.blobs import read_media_bytes
from mllm.data.indexing.index_cache import current_index
from mllm.data.indexing.index_format import BatchRows, column_of, media_columns
from mllm.data.quarantine import Bad, check_quarantine, read_quarantine
from mllm.data.schema import MediaItem, Row
from mllm.data.sources import Source


def open_index(
    source: Source, *, cache_dir: Path | None = None, progress: Callable[[int], Any] | None = None
) -> "RowIndex":
    """Open the index of a source; build it first where the cache has none that is up to date.

    Args:
        source: What to read. `take` and `weight` are the mixture's: an index holds all rows.
        cache_dir: Where indexes are kept; by default the directory that the environment names as MLLM_CACHE, else
            `~/.cache/mllm/index`.
        progress: Told how many more records have been read, while an index is built (`tqdm(...).update`).

    Raises:
        MediaError: Media cannot be used, and `on_bad` is "error", or they are more than `max_bad_rate`.
        RowError: The same for rows. The whole source was read; the message has the first five and the list's path.
        OptionError: There are no such files, they are of no known form, or they change while they are read.
    """
    directory = current_index(source, cache_dir=cache_dir, progress=progress)
    index = RowIndex(directory, source)
    check_quarantine(directory / "quarantine.jsonl", source, num_bad=index.num_bad, num_good=len(index))
    return index


class RowIndex(Sequence[Row]):
    """The rows of a source, in its order; read from a memory-mapped file when they are asked for.

    Sent to another process it travels as two paths.

    Args:
        directory: A complete index.
        source: What it was made of.
    """

    def __init__(self, directory: Path, source: Source):
        self.directory = directory
        self.source = source
        facts = json.loads((directory / "index.json").read_bytes())
        self.key: str = facts["key"]
        """A hash of all rows: equal rows have equal keys, wherever the files lie."""
        self.importer: str = facts["importer"]
        self.num_bad: int = facts["num_bad"]
        """How many rows were left out because they, or their media, are broken."""
        self.dropped: Counter[str] = Counter(facts["dropped"])
        """How many records the importer left out on purpose, by reason."""
        self._num_rows: int = facts["num_rows"]
        self._media_root = Path(facts["media_root"])

    def __reduce__(self) -> Any:
        return RowIndex, (self.directory, self.source)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row {index} of {self._num_rows}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = self._ends[number - 1] if number else 0
        return self._batch_rows(number)[int(index - start)]

    @property
    def derived_dir(self) -> Path:
        """Where what is computed of the rows is kept; equal rows share it."""
        return self.directory.parents[1] / "derived" / self.key[:32]

    @property
    def licence(self) -> str:
        """Of the data, as the source states it."""
        return self.source.licence

    @property
    def char_lengths(self) -> np.ndarray:
        """UTF-8 bytes of all texts of each row, int32."""
        return self.column("num_bytes")

    def column(self, name: str) -> np.ndarray:
        """A column of numbers: such as "num_messages", or "number", the place of the record in the source."""
        return column_of(self._batches, name)

    def media_columns(self, *names: str) -> tuple[np.ndarray, ...]:
        """Columns of numbers of all media, such as "height", one value an item; the first is the place of its row."""
        return media_columns(self._batches, *names)

    def bad(self) -> list[Bad]:
        """What was left out, in the order of the source; a row with two bad files stands there twice."""
        return list(read_quarantine(self.directory / "quarantine.jsonl"))

    def media_bytes_of(self, item: MediaItem) -> Path | bytes:
        """What a decoder takes: a media item's file, or its embedded bytes."""
        return read_media_bytes(item)

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        file = pa.ipc.open_file(pa.memory_map(str(self.directory / "rows.arrow")))
        return [file.get_batch(number) for number in range(file.num_record_batches)]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.array(list(accumulate(batch.num_rows for batch in self._batches)), dtype=np.int64)

    @cached_property
    def _opened(self) -> dict[int, BatchRows]:
        return {}

    def _batch_rows(self, number: int) -> BatchRows:
        if number not in self._opened:
            self._opened[number] = BatchRows(self._batches[number], self._media_root, self.directory)
        return self._opened[number]
