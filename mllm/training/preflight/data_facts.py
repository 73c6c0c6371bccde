"""What a preflight tells of the data: sources, lengths, the plan of the first epoch, one micro-batch of it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mllm.data.auditing.batch_text import row_text
from mllm.data.batch_plan import BatchPlan, Step
from mllm.data.examples import Example, Examples
from mllm.data.labels import IGNORED
from mllm.data.pairs import Pair
from mllm.training.preflight.report import BatchFacts, LengthFacts, PlanFacts, SourceFacts

HISTOGRAM_BINS = 12


def source_facts(examples: Examples) -> tuple[SourceFacts, ...]:
    """What becomes of the rows of every source."""
    rows, order = examples.rows, examples.order
    used = np.bincount(np.searchsorted(rows.ends, examples.used, side="right"), minlength=len(rows.indexes))
    dropped: dict[int, Counter[str]] = {number: Counter() for number in range(len(rows.indexes))}
    for (number, reason), count in examples.dropped_by_source.items():
        dropped[number][reason] += count
    return tuple(
        SourceFacts(
            path=str(index.source.path),
            rows=len(rows.taken[number]),
            used=int(used[number]),
            dropped=dict(dropped[number].most_common()),
            unreadable=index.num_bad,
            per_epoch=order.counts[number],
        )
        for number, index in enumerate(rows.indexes)
    )


def length_facts(examples: Examples) -> LengthFacts:
    """How long the rows are that are used."""
    lengths = examples.lengths
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = -(-(longest - shortest + 1) // HISTOGRAM_BINS)
    counts = np.bincount((lengths - shortest) // width)
    return LengthFacts(
        measure=examples.measure,
        shortest=shortest,
        median=int(np.percentile(lengths, 50, method="nearest")),
        longest=longest,
        total=int(lengths.sum()),
        edges=tuple(shortest + width * number for number in range(len(counts) + 1)),
        counts=tuple(counts.tolist()),
    )


def plan_facts(
    plan: BatchPlan, lengths: np.ndarray, *, batching: str, world_size: int, pack_length: int | None
) -> tuple[PlanFacts, Step, np.ndarray]:
    """The first epoch's plan in figures.

    Args:
        plan: Of all ranks.
        lengths: Tokens of each row.
        batching: Its name.
        world_size: Number of ranks.
        pack_length: Places of a pack; None where rows are padded.

    Returns:
        The figures, the micro-batches of the first step, and the largest micro-batch of all.
    """
    first: Step = []
    largest, most_tokens = np.empty(0, np.int64), -1
    num_rows, tokens, slots, excess = [], 0, 0, []
    for step in plan(0):
        first = first or step
        loads = []
        for batch in step:
            loads.append(int(lengths[batch].sum()))
            computed = loads[-1] if pack_length else padded_size(lengths[batch])
            slots += pack_length or computed
            num_rows.append(len(batch))
            if computed > most_tokens:
                largest, most_tokens = batch, computed
        tokens += sum(loads)
        excess.append(max(loads) * len(loads) / max(sum(loads), 1) - 1.0)
    facts = PlanFacts(
        batching=batching,
        world_size=world_size,
        micro_batches=len(plan),
        rows=sum(num_rows),
        tokens=tokens,
        slots=slots,
        empty_share=1.0 - tokens / max(slots, 1),
        fewest_rows=min(num_rows),
        most_rows=max(num_rows),
        most_tokens=most_tokens,
        imbalance=float(np.mean(excess)),
    )
    return facts, first, largest


def padded_size(lengths: np.ndarray) -> int:
    """Places of a padded micro-batch.

    Example: rows of 3 and 5 tokens take 10.
    """
    return len(lengths) * int(lengths.max()) if len(lengths) else 0


def batch_facts(tokenizer: Any, batch: Mapping[str, Any], first: Example | Pair) -> BatchFacts:
    """A micro-batch as the model reads it.

    Args:
        tokenizer: Of the model.
        batch: Collated.
        first: Its first row, of which all sides are shown.
    """
    sides = first.sides if isinstance(first, Pair) else (first,)
    texts = [row_text(tokenizer, batch, number) for number in range(len(sides))]
    return BatchFacts(
        shapes={name: _shape(value) for name, value in batch.items()},
        row=first.row.id,
        source=first.row.source,
        tokens=first.length,
        learned=sum(int((side.labels[1:] != IGNORED).sum()) for side in sides),
        text="\n\n".join(texts),
    )


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
