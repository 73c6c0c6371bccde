"""Rows as a model is trained on them: encoded text, and media still on disk."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mllm.data.labels import IGNORED, has_uneven_weights, labels_of
from mllm.data.schema import Row
from mllm.errors import OptionError, RowError
from mllm.processing import MllmProcessor

OVERLONG = ("drop", "error")
CACHED_TOKENS = 20_000_000
"""Encoded text is kept in memory up to this many tokens (160 MB); beyond it rows are encoded again when due."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row, encoded: ids and labels of equal length; weights only where they are not all 0 or 1."""

    row: Row
    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray | None


def encode_row(row: Row, processor: MllmProcessor) -> Example:
    """A row's ids and labels from one call of the processor, media counted by their size alone."""
    sizes = [(item.height, item.width) for item in row.media]
    chat = processor.encode_chat(row.messages, media_sizes=sizes, where=row.name)
    weights = np.array(chat.loss_weights, dtype=np.float32) if has_uneven_weights(chat.loss_weights) else None
    labels = labels_of(chat.input_ids, chat.loss_weights)
    return Example(row, np.array(chat.input_ids, dtype=np.int32), np.array(labels, dtype=np.int32), weights)


class Examples(Dataset[Example]):
    """The rows that are trained on, checked and measured before the first step.

    Args:
        rows: All rows.
        processor: Encodes them.
        max_length: Longest row in tokens, placeholders included; None for no limit.
        overlong: What becomes of longer ones: "drop" (counted) or "error".
        progress: Called once a row.

    Raises:
        OptionError: `overlong` is unknown, or no row is left.
        RowError: A row is malformed, or too long under "error".
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: MllmProcessor,
        *,
        max_length: int | None = None,
        overlong: str = "drop",
        progress: Callable[[], Any] | None = None,
    ):
        if overlong not in OVERLONG:
            raise OptionError(f"overlong = {overlong!r}", expected=f"one of {', '.join(OVERLONG)}", do="choose one")
        self.rows = rows
        self.processor = processor
        self.used: list[int] = []
        self.lengths: list[int] = []
        self.dropped: Counter[str] = Counter()
        self._cache: list[Example] | None = []
        self._num_tokens = 0
        for index in range(len(rows)):
            self._measure(index, max_length, overlong)
            if progress:
                progress()
        if not self.used:
            raise OptionError(
                f"no row left of {len(rows)} (dropped: {dict(self.dropped)})",
                expected="at least one row to train on",
                do="raise `max_length`, or name other data",
            )

    def _measure(self, index: int, max_length: int | None, overlong: str) -> None:
        example = encode_row(self.rows[index], self.processor)
        length = len(example.input_ids)
        if not (example.labels[1:] != IGNORED).any():
            self.dropped["nothing to learn from"] += 1
            return
        if max_length is not None and length > max_length:
            if overlong == "error":
                raise RowError(
                    f"{example.row.name} has {length} tokens",
                    expected=f"at most max_length = {max_length}",
                    do="raise `max_length`, or set `overlong: drop`",
                )
            self.dropped["longer than max_length"] += 1
            return
        self.used.append(index)
        self.lengths.append(length)
        if self._cache is not None:
            self._cache.append(example)
            self._num_tokens += length
            if self._num_tokens > CACHED_TOKENS:
                self._cache = None

    def __len__(self) -> int:
        return len(self.used)

    def __getitem__(self, index: int) -> Example:
        if self._cache is not None:
            return self._cache[index]
        return encode_row(self.rows[self.used[index]], self.processor)
