"""The facts of a preflight, as they are written to a file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mllm.training.preflight.memory import MemoryEstimate


@dataclass(frozen=True)
class PartFacts:
    """A part: how large it is and how it is trained.

    Args:
        name: Of the part.
        mode: "frozen", "lora" or "full".
        parameters: All of its numbers, adapters left out.
        trained: Those that are trained, adapters included.
        learning_rate: None where nothing is trained.
        num_layers: How many layers it has, 0 where it is no stack of them.
        layers: The range that is trained; None for all.
        quantize: "4bit", or None.
        checkpointing: Whether activations are computed again in the backward.
        num_adapted: Modules that carry an adapter.
        adapted: The first of their names.
    """

    name: str
    mode: str
    parameters: int
    trained: int
    learning_rate: float | None
    num_layers: int
    layers: str | None
    quantize: str | None
    checkpointing: bool
    num_adapted: int
    adapted: tuple[str, ...]


@dataclass(frozen=True)
class GroupFacts:
    """A group of the optimiser."""

    name: str
    tensors: int
    parameters: int
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class SourceFacts:
    """What becomes of a source's rows.

    Args:
        path: Where they are.
        rows: How many are taken of those that can be read.
        used: How many are trained on.
        dropped: The others by reason.
        unreadable: Rows that are broken and left out, and media, found when the source was indexed.
        per_epoch: How many rows of it an epoch has.
    """

    path: str
    rows: int
    used: int
    dropped: dict[str, int]
    unreadable: int
    per_epoch: int


@dataclass(frozen=True)
class LengthFacts:
    """How long the rows are that are used, in tokens.

    Args:
        measure: How that is known: "encoded" and "counted" are exact, "bounded" is at most.
        shortest: Of all.
        median: Of all.
        longest: Of all.
        total: Tokens of all rows.
        edges: Of the histogram; one more than counts.
        counts: Rows from an edge up to the next.
    """

    measure: str
    shortest: int
    median: int
    longest: int
    total: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class PlanFacts:
    """The micro-batches of the first epoch, over all ranks.

    Args:
        batching: "random", "length" or "packed".
        world_size: Number of ranks.
        micro_batches: Of a rank.
        rows: Of the epoch.
        tokens: Of the epoch.
        slots: Places of all micro-batches: padded up to their longest row, or packs up to their full length.
        empty_share: Of the places those that hold no token: padding, or what is left free in packs. Free places of a
            pack are not computed.
        fewest_rows: Of a micro-batch.
        most_rows: Of a micro-batch.
        most_tokens: Places of the largest micro-batch that are computed.
        imbalance: By how much the rank with the most tokens exceeds the mean, on average over the steps.
    """

    batching: str
    world_size: int
    micro_batches: int
    rows: int
    tokens: int
    slots: int
    empty_share: float
    fewest_rows: int
    most_rows: int
    most_tokens: int
    imbalance: float


@dataclass(frozen=True)
class StepFacts:
    """How long the run is.

    Args:
        per_epoch: Optimiser steps.
        total: Of the run.
        epochs: Of the run.
        rows_per_step: On average, over all ranks and accumulation.
        tokens_per_step: On average.
        goes_on_from: Name of the checkpoint that the run would go on from; None for a new run.
        is_finished: Whether the model is there already.
    """

    per_epoch: int
    total: int
    epochs: float
    rows_per_step: float
    tokens_per_step: float
    goes_on_from: str | None
    is_finished: bool


@dataclass(frozen=True)
class BatchFacts:
    """The first micro-batch, collated.

    Args:
        shapes: Of its tensors, such as "int64 [2, 57]".
        row: Id of the first row.
        source: Of the first row.
        tokens: Of the first row.
        learned: How many of them are.
        text: The row as the model reads it; [[...]] is what it learns to say.
    """

    shapes: dict[str, str]
    row: str
    source: str
    tokens: int
    learned: int
    text: str


@dataclass(frozen=True)
class Preflight:
    """What a run would do."""

    model: str
    model_class: str
    parts: tuple[PartFacts, ...]
    groups: tuple[GroupFacts, ...]
    sources: tuple[SourceFacts, ...]
    validation: tuple[SourceFacts, ...]
    lengths: LengthFacts
    plan: PlanFacts
    steps: StepFacts
    memory: MemoryEstimate
    batch: BatchFacts


def write_report(report: Preflight, path: Path) -> None:
    """Write the facts as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
