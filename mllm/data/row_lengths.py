"""What is known about the rows of a mixture before any of them is encoded: their media, and how long they are."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mllm.data.indexing.index import RowIndex
from mllm.data.indexing.token_bounds import media_tokens, token_bounds
from mllm.data.indexing.token_counts import count_tokens, has_counts
from mllm.data.mixture import Mixture
from mllm.data.schema import MEDIA_KINDS
from mllm.processing import TrainingProcessor


def are_counted(rows: Mixture, processor: TrainingProcessor) -> bool:
    """Whether the tokens of all rows were counted before, by `count_tokens` under this very processor."""
    return all(has_counts(index, processor) for index in rows.indexes)


def counted_lengths(
    rows: Mixture, processor: TrainingProcessor, *, progress: Callable[[int], Any] | None = None
) -> np.ndarray:
    """The tokens of every row, 0 where it cannot be encoded; counted now where that was not done before."""
    return _joined(rows, lambda index: count_tokens(index, processor, progress=progress))


def bounded_lengths(rows: Mixture, processor: TrainingProcessor) -> np.ndarray:
    """At least as many tokens as every row has, at once."""
    return _joined(rows, lambda index: token_bounds(index, processor))


def lengths_of_media(rows: Mixture, processor: TrainingProcessor) -> np.ndarray:
    """The tokens that the media of every row become: of images by their rule, of sounds and videos at most."""
    return _joined(rows, lambda index: media_tokens(index, processor))


def foreign_kinds(rows: Mixture, kinds: tuple[str, ...]) -> np.ndarray:
    """Of every row the number in `MEDIA_KINDS` of a medium that is not of these kinds, -1 where there is none."""
    known = np.isin(np.arange(len(MEDIA_KINDS)), [MEDIA_KINDS.index(kind) for kind in kinds])

    def of_index(index: RowIndex) -> np.ndarray:
        numbers, found = index.media_columns("kind")
        foreign = ~known[found.astype(np.int64)]
        marks = np.full(len(index), -1)
        marks[numbers[foreign][::-1]] = found[foreign][::-1]  # the first of a row is written last
        return marks

    return _joined(rows, of_index)


def _joined(rows: Mixture, measure: Callable[[RowIndex], np.ndarray]) -> np.ndarray:
    parts = [measure(index)[taken] for index, taken in zip(rows.indexes, rows.taken, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *parts])
