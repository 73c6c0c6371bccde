"""How many tokens each row has: bounds at once, exact numbers in a second pass over the texts that is cached.

A preference counts as its longest side: what one of its conversations takes at most.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from mllm.data.coordinates import move_row
from mllm.data.indexing.index import RowIndex
from mllm.data.schema import MediaItem, PreferenceRow, Row
from mllm.errors import RowError
from mllm.processing import TrainingProcessor
from mllm.processing.chat_lengths import Chat, ChatLengths
from mllm.sizes import MediaSize

CHUNK_ROWS = 2048
"""Rows that are counted at a time; an interrupted pass goes on behind the last complete chunk."""
FEW_ROWS = 20_000
"""Fewer rows are counted in this process: starting others takes longer."""
_OPEN = 0xFFFFFFFF


def count_tokens(
    index: RowIndex,
    processor: TrainingProcessor,
    *,
    workers: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """The length of every row's `encode_chat(...).input_ids`, placeholders of media included.

    0 stands for a row that `encode_chat` refuses: media for which the model has no place, roles that the template
    refuses. Such a row cannot be trained on.

    The numbers are kept under the hash of the rows and of all that decides about tokens, so a second call reads them
    from disk. An interrupted call is taken up again at the first missing chunk.

    Args:
        index: The rows.
        processor: Its tokenizer, template and rule for images decide.
        workers: Processes; by default as many as there are cores, and none but this one for few rows.
        progress: Told how many more rows are counted (`tqdm(...).update`).

    Returns:
        One number a row, uint32; memory-mapped and read-only.
    """
    if not len(index):
        return np.empty(0, np.uint32)
    index.derived_dir.mkdir(parents=True, exist_ok=True)
    done = _counts_file(index, processor)
    with FileLock(f"{done}.lock"):
        if not done.exists():
            partial = _open_partial(done.with_suffix(".partial"), len(index))
            starts = [
                start for start in range(0, len(index), CHUNK_ROWS) if _OPEN in partial[start : start + CHUNK_ROWS]
            ]
            if progress:
                progress(len(index) - sum(min(CHUNK_ROWS, len(index) - start) for start in starts))
            for start, counts in _counted(index, processor, starts, workers):
                partial[start : start + len(counts)] = counts
                if progress:
                    progress(len(counts))
            partial.flush()
            done.with_suffix(".partial").rename(done)
    return np.load(done, mmap_mode="r")


def has_counts(index: RowIndex, processor: TrainingProcessor) -> bool:
    """Whether `count_tokens` has been through these rows under this very processor."""
    return not len(index) or _counts_file(index, processor).is_file()


def _counts_file(index: RowIndex, processor: TrainingProcessor) -> Path:
    return index.derived_dir / f"tokens-{fingerprint(processor)[:32]}.npy"


def fingerprint(processor: TrainingProcessor) -> str:
    """A hash of everything that decides how many tokens a conversation has."""
    tokenizer = processor.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    facts = {
        "version": 1,
        # What an earlier call of the tokenizer may have left on does not count here.
        "tokenizer": {key: value for key, value in backend.items() if key not in ("padding", "truncation")},
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": processor.chat_template,
        "tokens": [*processor.media_tokens, processor.end_of_turn_token],
        "images": processor.media_rule(),
        "geometry": processor.image_geometry,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def chats_of(row: Row, geometry: str | None) -> list[Chat]:
    """The conversations a row is trained on: one, or the sides of a preference.

    Args:
        row: The row.
        geometry: How an image becomes the encoder's square; boxes move with it.

    Raises:
        RowError: A box lies outside of what the encoder sees.
    """
    if row.coordinates and geometry is not None:
        row = move_row(row, geometry)
    if not isinstance(row, PreferenceRow):
        return [Chat(row.messages, _sizes(row.media), row.name)]
    sides = [(row.chosen, row.chosen.media or row.media), (row.rejected, row.rejected.media or row.media)]
    if row.contrast is not None:
        sides.append((row.chosen, row.contrast))
    return [
        Chat([*row.messages, {"role": "assistant", "content": answer.content}], _sizes(media), row.name)
        for answer, media in sides
    ]


def _sizes(media: Iterable[MediaItem]) -> list[MediaSize]:
    return [item.size for item in media]


@dataclass
class _Counter:
    """What a process needs to count."""

    index: RowIndex
    processor: TrainingProcessor

    def __post_init__(self) -> None:
        self.lengths = ChatLengths(self.processor)

    def count(self, start: int) -> np.ndarray:
        """The rows of the chunk that begins here."""
        chats: list[Chat] = []
        ends = []
        for place in range(start, min(start + CHUNK_ROWS, len(self.index))):
            try:
                chats += chats_of(self.index[place], self.processor.image_geometry)
            except RowError:
                chats.append(Chat([]))  # refused, and so counted as 0
            ends.append(len(chats))
        lengths = np.array(self.lengths(chats), np.uint32)
        # A preference with a side that cannot be encoded cannot be used.
        longest, shortest = (reduce.reduceat(lengths, [0, *ends[:-1]]) for reduce in (np.maximum, np.minimum))
        return np.where(shortest == 0, 0, longest).astype(np.uint32)


_counter: _Counter | None = None
"""Of a worker process."""


def _start_worker(index: RowIndex, processor: TrainingProcessor) -> None:
    global _counter
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process for each core already
    _counter = _Counter(index, processor)


def _count_in_worker(start: int) -> tuple[int, np.ndarray]:
    assert _counter is not None
    return start, _counter.count(start)


def _counted(
    index: RowIndex, processor: TrainingProcessor, starts: list[int], workers: int | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Chunks as they become ready."""
    if workers is None:
        workers = 1 if len(starts) * CHUNK_ROWS < FEW_ROWS else (os.cpu_count() or 1)
    if workers <= 1:
        counter = _Counter(index, processor)
        yield from ((start, counter.count(start)) for start in starts)
        return
    # Not forked: a copy of a process with threads may hang.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(index, processor)
    )
    try:
        for future in as_completed([pool.submit(_count_in_worker, start) for start in starts]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _open_partial(path: Path, size: int) -> np.memmap:
    """Counts so far; rows that have none hold a number that no row can have."""
    if not path.exists():
        new = path.with_suffix(".new")
        with new.open("wb") as file:
            np.save(file, np.full(size, _OPEN, np.uint32))
        new.rename(path)
    return np.lib.format.open_memmap(path, mode="r+")
