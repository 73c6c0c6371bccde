"""Rows as a model is trained on them: encoded text, and media still on disk."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mllm.data.coordinates import CroppedAwayError, move_row
from mllm.data.labels import IGNORED, has_uneven_weights, labels_of
from mllm.data.left_out import BAD, LeftOut, LeftOutRows
from mllm.data.mixture import Mixture
from mllm.data.order import EpochOrder
from mllm.data.quarantine import Bad
from mllm.data.row_lengths import are_counted, bounded_lengths, counted_lengths, foreign_kinds
from mllm.data.schema import MEDIA_KINDS, MediaItem, PreferenceRow, Row, has_target_media
from mllm.errors import OptionError, RowError
from mllm.processing import TrainingProcessor

OVERLONG = ("drop", "error")
CACHED_TOKENS = 20_000_000
"""Encoded text is kept in memory up to this many tokens (160 MB); beyond it rows are encoded again when due."""
TOO_LONG = "longer than max_length"
MEASURES = ("encoded", "counted", "bounded")
"""How rows are measured before the first step: by encoding them, by counts that are kept with the index, or by bounds
from numbers in the index, which leave it to the moment when a row is due."""
ENCODED_AT_START = 20_000
"""A mixture of more rows is not encoded before the first step, which would take minutes, but row by row when due."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row, encoded: ids and labels of equal length; weights only where they are not all 0 or 1.

    Args:
        row: The row.
        input_ids: Of its conversation.
        labels: -100 where nothing is learned.
        loss_weights: Of the labels, or None.
        position: Of the row in its mixture, to be found again by; -1 where it is of none.
        media: What a decoder takes for each of the row's media, where that is at hand already (streams).
    """

    row: Row
    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray | None
    position: int = -1
    media: tuple[Path | bytes, ...] | None = None

    @property
    def length(self) -> int:
        """Tokens, placeholders of media included."""
        return len(self.input_ids)

    @property
    def media_items(self) -> tuple[MediaItem, ...]:
        """The media that a batch with this example holds, each once."""
        return self.row.media


def encode_row(row: Row, processor: TrainingProcessor) -> Example:
    """A row's ids and labels from one call of the processor, media counted by their size alone.

    Boxes in the texts are moved to where the encoder sees what they mark.

    Raises:
        CroppedAwayError: A box marks what the encoder does not see.
        RowError: The row is malformed, or the chat template refuses it.
    """
    row = move_row(row, processor.image_geometry)
    sizes = [item.size for item in row.media]
    chat = processor.encode_chat(row.messages, media_sizes=sizes, where=row.name)
    weights = np.array(chat.loss_weights, dtype=np.float32) if has_uneven_weights(chat.loss_weights) else None
    labels = labels_of(chat.input_ids, chat.loss_weights)
    return Example(row, np.array(chat.input_ids, np.int32), np.array(labels, np.int32), weights)


def example_of(
    row: Row,
    processor: TrainingProcessor,
    *,
    max_length: int | None = None,
    overlong: str = "drop",
    position: int = -1,
    media: tuple[Path | bytes, ...] | None = None,
) -> Example | LeftOut:
    """A row as it is trained on, or why it is not. Never raises because of a row, as data workers must not.

    Args:
        row: The row.
        processor: Encodes it.
        max_length: Longest row in tokens, placeholders included; None for no limit.
        overlong: What becomes of longer ones: "drop", or "error".
        position: See `Example`.
        media: See `Example`.
    """
    if isinstance(row, PreferenceRow):
        return LeftOut(position, BAD, error=_preference(row), is_error=True)
    if reason := unusable(row, row.media, processor):
        return LeftOut(position, reason)
    try:
        example = encode_row(row, processor)
    except CroppedAwayError:
        return LeftOut(position, "a box outside of what the encoder sees")
    except RowError as error:
        return LeftOut(position, BAD, bad=Bad(row.id, row.where, "", error.found), error=error)
    if not (example.labels[1:] != IGNORED).any():
        return LeftOut(position, "nothing to learn from")
    if max_length is not None and example.length > max_length:
        return too_long(row, example.length, max_length, overlong=overlong, position=position)
    return replace(example, position=position, media=media)


class Examples(Dataset[Any]):
    """The rows that are trained on.

    A small mixture is encoded, checked and measured here, before the first step. Of a large one a row is encoded when
    it is due; one that cannot be trained on is then a `LeftOut` in its batch. What can be told without reading a text
    is told here all the same: media that the model has no tower for, and rows that are too long where `count_tokens`
    has been through the data before.

    Args:
        rows: All rows.
        processor: Encodes them.
        max_length: Longest row in tokens, placeholders included; None for no limit.
        overlong: What becomes of longer ones: "drop" (counted) or "error".
        progress: Called once a row that is encoded here, or with a number of rows that are counted here.
        measure: One of `MEASURES`; None to choose by size, and by whether counts are there. A run that goes on needs
            the one that it began with: another leaves other rows out, and so has another order.
        is_exact: Whether lengths have to be exact, as for packing; then a large mixture is counted, which takes a
            while the first time, where it would be bounded.

    Raises:
        OptionError: `overlong` is unknown, or no row is left.
        RowError: A row is malformed (and its source has `on_bad: error`), or too long under "error".
    """

    def __init__(
        self,
        rows: Mixture,
        processor: TrainingProcessor,
        *,
        max_length: int | None = None,
        overlong: str = "drop",
        progress: Callable[..., Any] | None = None,
        measure: str | None = None,
        is_exact: bool = False,
    ):
        if overlong not in OVERLONG:
            raise OptionError(f"overlong = {overlong!r}", expected=f"one of {', '.join(OVERLONG)}", do="choose one")
        self.rows = rows
        self.processor = processor
        self.max_length = max_length
        self.overlong = overlong
        self.measure = measure or _measure_for(rows, processor, is_exact=is_exact)
        self.account = LeftOutRows(rows)
        self._cache: list[Any] | None = None
        self.num_unmeasured = 0
        """How many rows may yet turn out to be longer than `max_length`."""
        if self.measure == "encoded":
            self._encode_all(progress)
        else:
            self._look_at_all(progress)
        self.dropped, self.account.counts = self.account.counts, Counter()
        """How many rows were left out before the first step, by reason; the account goes on with what is due."""
        self.dropped_by_source, self.account.by_source = self.account.by_source, Counter()
        """The same by the number of the source in the mixture and the reason."""
        if not len(self.used):
            raise OptionError(
                f"no row left of {len(rows)} (dropped: {dict(self.dropped)})",
                expected="at least one row to train on",
                do="raise `max_length`, or name other data",
            )

    @property
    def order(self) -> EpochOrder:
        """The order of epochs, in positions among these examples."""
        return self.rows.order_of(self.used)

    def __len__(self) -> int:
        return len(self.used)

    def __getitem__(self, index: int) -> Any:
        """An `Example`, or a `LeftOut`."""
        if self._cache is not None:
            return self._cache[index]
        return self._example(int(self.used[index]))

    def media_of(self, position: int) -> tuple[MediaItem, ...]:
        """The media that a batch with the row at this position of the mixture holds."""
        return self.rows[position].media

    def _example(self, position: int) -> Any:
        return example_of(
            self.rows[position],
            self.processor,
            max_length=self.max_length,
            overlong=self.overlong,
            position=position,
        )

    def _encode_all(self, progress: Callable[..., Any] | None) -> None:
        used, lengths, cache, num_tokens = [], [], [], 0
        for position in range(len(self.rows)):
            example = self._example(position)
            if progress:
                progress()
            if isinstance(example, LeftOut):
                self.account.add(example)
                continue
            used.append(position)
            lengths.append(example.length)
            num_tokens += example.length
            if num_tokens <= CACHED_TOKENS:
                cache.append(example)
        self._cache = cache if len(cache) == len(used) else None
        self.used, self.lengths = np.array(used, np.int64), np.array(lengths, np.int64)

    def _look_at_all(self, progress: Callable[..., Any] | None) -> None:
        """What the indexes tell. The first row of each source is encoded, as preferences are no conversations."""
        for end, taken in zip(self.rows.ends, self.rows.taken, strict=True):
            first = self._example(end - len(taken))
            if isinstance(first, LeftOut) and first.is_error and first.reason == BAD:
                self.account.add(first)
        kinds = foreign_kinds(self.rows, self.processor.media_kinds)
        for number in np.unique(kinds[kinds >= 0]).tolist():
            self.account.count(np.flatnonzero(kinds == number), _no_tower(MEDIA_KINDS[number]))
        if self.measure == "counted":
            lengths = counted_lengths(self.rows, self.processor, progress=progress)
        else:
            lengths = bounded_lengths(self.rows, self.processor)
        is_used, is_long = kinds < 0, np.zeros(len(lengths), bool)
        if self.max_length is not None:
            is_long = is_used & (lengths > self.max_length)
        if self.measure == "bounded":
            self.num_unmeasured = int(is_long.sum())
        elif is_long.any():
            self.account.count(np.flatnonzero(is_long), TOO_LONG)
            if self.overlong == "error":
                longest = int(np.argmax(is_long))
                raise _too_long(self.rows[longest], int(lengths[longest]), self.max_length or 0)
            is_used &= ~is_long
        self.used, self.lengths = np.flatnonzero(is_used), lengths[is_used]


def _measure_for(rows: Mixture, processor: TrainingProcessor, *, is_exact: bool) -> str:
    if len(rows) <= ENCODED_AT_START:
        return "encoded"
    return "counted" if is_exact or are_counted(rows, processor) else "bounded"


def _no_tower(kind: str) -> str:
    return f"{kind}, for which the model has no tower"


def unusable(row: Row, media: Iterable[MediaItem], processor: TrainingProcessor) -> str:
    """Why the model cannot be trained on a row that is right in itself, "" where it can."""
    for item in media:
        if item.kind not in processor.media_kinds:
            return _no_tower(item.kind)
    return "media in an answer, which the model cannot make" if has_target_media(row) else ""


def _preference(row: Row) -> RowError:
    return RowError(
        f"{row.name}: a preference, with a chosen and a rejected answer",
        expected="a conversation with one answer, for supervised fine-tuning",
        do="train on it with train/rdpo.py, or name other data",
    )


def too_long(row: Row, length: int, max_length: int, *, overlong: str, position: int) -> LeftOut:
    """A row that is left out for its length, which is an error where `overlong` says so."""
    error = _too_long(row, length, max_length) if overlong == "error" else None
    return LeftOut(position, TOO_LONG, error=error, is_error=error is not None)


def _too_long(row: Row, length: int, max_length: int) -> RowError:
    return RowError(
        f"{row.name} has {length} tokens",
        expected=f"at most max_length = {max_length}",
        do="raise `max_length`, or set `overlong: drop`",
    )
