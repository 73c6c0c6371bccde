"""How long rows are, and what batches are made of."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mllm.data.auditing.render import encode_sides, num_learned, sides_of
from mllm.data.batch_plan import rank_batches
from mllm.data.mixture import Mixture
from mllm.data.schema import Row
from mllm.errors import RowError
from mllm.processing import TrainingProcessor


@dataclass(frozen=True, slots=True)
class RowSize:
    """A row in numbers, over all its sides. In tokens, or in words where nobody knows the tokens.

    Args:
        source: It comes from.
        words: Of all texts, split at blanks.
        learned: Tokens that the loss is computed on.
        read: Other tokens of text and template.
        media: Tokens that stand for media.
        num_media: Media items.
    """

    source: str
    words: int
    learned: int
    read: int
    media: int
    num_media: int

    @property
    def length(self) -> int:
        """All of it."""
        return self.learned + self.read + self.media


@dataclass(frozen=True, slots=True)
class BatchSize:
    """A padded batch in numbers of tokens (or words)."""

    learned: int
    read: int
    media: int
    padding: int
    sources: dict[str, int] = field(default_factory=dict)


def row_size(row: Row, source: str, processor: TrainingProcessor | None = None) -> RowSize | None:
    """Measure a row; None for one that the processor refuses, which an audit names."""
    sides = list(sides_of(row))
    learned = sum(_num_words(messages, learned=True) for _, messages, _ in sides)
    words = learned + sum(_num_words(messages, learned=False) for _, messages, _ in sides)
    num_media = sum(len(media) for *_, media in sides)
    if processor is None:
        return RowSize(source, words, learned, words - learned, 0, num_media)
    try:
        chats = encode_sides(row, processor)
    except RowError:
        return None
    of_media = sum(span.length for chat in chats for span in chat.media)
    of_learned = sum(num_learned(chat) for chat in chats)
    total = sum(len(chat.input_ids) for chat in chats)
    return RowSize(source, words, of_learned, total - of_learned - of_media, of_media, num_media)


def first_batches(mixture: Mixture, *, batch_size: int, seed: int, count: int) -> list[list[int]]:
    """Positions of the rows of an epoch's first batches, as one process would draw them."""
    order = mixture.epoch_order(0, seed)
    return list(islice(rank_batches(order, batch_size=batch_size, rank=0, world_size=1), count))


def batch_of(sizes: Sequence[RowSize]) -> BatchSize:
    """What a batch of these rows holds when it is padded to its longest row.

    Example: rows of 3 and 5 tokens make a batch of 2 x 5 = 10 tokens, of which 2 are padding.
    """
    longest = max((size.length for size in sizes), default=0)
    return BatchSize(
        learned=sum(size.learned for size in sizes),
        read=sum(size.read for size in sizes),
        media=sum(size.media for size in sizes),
        padding=longest * len(sizes) - sum(size.length for size in sizes),
        sources=dict(Counter(size.source for size in sizes)),
    )


@dataclass(frozen=True)
class Statistics:
    """A sample of a mixture, measured.

    Args:
        unit: "tokens", or "words" where there is no processor.
        num_rows: Of the mixture.
        sizes: Of the sample.
        batches: The first of an epoch.
        batch_size: Rows in each.
        refused: Rows of the sample that the processor refuses.
    """

    unit: str
    num_rows: int
    sizes: list[RowSize]
    batches: list[BatchSize]
    batch_size: int
    refused: int

    def summary(self) -> dict[str, Any]:
        """Per source: rows, media items, and smallest, median, 95th percentile and largest length."""
        names = dict.fromkeys(size.source for size in self.sizes)
        lines = [_summary(name, [size for size in self.sizes if size.source == name]) for name in names]
        return {"unit": self.unit, "rows": self.num_rows, "rows_refused": self.refused, "sources": lines}


def measure(
    mixture: Mixture,
    processor: TrainingProcessor | None,
    *,
    positions: Sequence[int],
    batch_size: int,
    num_batches: int,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Statistics:
    """Measure some rows, and the batches that an epoch begins with.

    Args:
        mixture: The rows.
        processor: Counts tokens; without one, words are counted.
        positions: Of the rows of the sample.
        batch_size: Rows of a batch.
        num_batches: How many batches.
        seed: Decides the order of the epoch.
        progress: Is handed the positions, and hands them on.
    """
    batches = first_batches(mixture, batch_size=batch_size, seed=seed, count=num_batches)
    needed = dict.fromkeys([*positions, *(position for batch in batches for position in batch)])
    sizes: dict[int, RowSize | None] = {}
    for position in progress(needed):
        source = mixture.source(position)
        sizes[position] = row_size(mixture[position], source.name or Path(source.path).stem, processor)
    sample = [size for size in map(sizes.__getitem__, positions) if size is not None]
    made = [batch_of([size for size in map(sizes.__getitem__, batch) if size is not None]) for batch in batches]
    unit = "words" if processor is None else "tokens"
    return Statistics(unit, len(mixture), sample, made, batch_size, len(positions) - len(sample))


def _summary(name: str, sizes: Sequence[RowSize]) -> dict[str, Any]:
    lengths = np.array([size.length for size in sizes])
    low, median, high, top = np.percentile(lengths, (0, 50, 95, 100), method="nearest").astype(int).tolist()
    return {
        "source": name,
        "rows": len(sizes),
        "media_items": sum(size.num_media for size in sizes),
        "words": sum(size.words for size in sizes),
        "lengths": {"min": low, "median": median, "p95": high, "max": top},
        "learned_share": round(sum(size.learned for size in sizes) / max(int(lengths.sum()), 1), 4),
        "media_share": round(sum(size.media for size in sizes) / max(int(lengths.sum()), 1), 4),
    }


def _num_words(messages: Sequence[dict[str, Any]], *, learned: bool) -> int:
    count = 0
    for message in messages:
        is_learned = message["role"] == "assistant" and bool(1.0 if message.get("loss") is None else message["loss"])
        if is_learned == learned:
            content = message["content"]
            texts = [content] if isinstance(content, str) else [item.get("text") or "" for item in content]
            count += sum(len(text.split()) for text in texts)
    return count
