"""The facts of a preflight as tables for a terminal."""

import re
from collections.abc import Sequence
from pathlib import Path

from mllm.training.preflight.report import LengthFacts, Preflight, SourceFacts

BAR = 40
NUMBER = re.compile(r"[\d,.e-]*")
GIB = 2**30


def report_text(report: Preflight) -> str:
    """All of it, section by section."""
    sections = [
        ("parts", _parts(report)),
        ("optimiser", _groups(report)),
        ("adapters", _adapters(report)),
        ("data", _sources(report.sources)),
        ("validation", _sources(report.validation)),
        (f"lengths in tokens ({report.lengths.measure})", _lengths(report.lengths)),
        ("micro-batches of the first epoch", _plan(report)),
        ("steps", _steps(report)),
        ("memory of a rank, estimated", _memory(report)),
        ("first micro-batch", _batch(report)),
    ]
    return "\n\n".join(f"{title}\n{body}" for title, body in sections if body)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first flush left, as are those of words; numbers flush right."""
    columns = list(zip(header, *rows, strict=True))
    lines = []
    for row in (header, *rows):
        cells = []
        for value, column in zip(row, columns, strict=True):
            width = max(map(len, column))
            is_number = all(NUMBER.fullmatch(cell) for cell in column[1:])
            cells.append(value.rjust(width) if is_number else value.ljust(width))
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _parts(report: Preflight) -> str:
    header = ("part", "mode", "parameters", "trained", "learning rate", "layers", "weights", "checkpointing")
    rows = []
    for part in report.parts:
        layers = f"{part.layers or 'all'} of {part.num_layers}" if part.num_layers else "-"
        rate = "-" if part.learning_rate is None else f"{part.learning_rate:g}"
        weights, checkpointing = part.quantize or "whole", "yes" if part.checkpointing else "no"
        numbers = (f"{part.parameters:,}", f"{part.trained:,}")
        rows.append([part.name, part.mode, *numbers, rate, layers, weights, checkpointing])
    totals = (sum(part.parameters for part in report.parts), sum(part.trained for part in report.parts))
    rows.append(["all", "", *(f"{total:,}" for total in totals), "", "", "", ""])
    return f"  {report.model_class} from {report.model}\n{table(header, rows)}"


def _groups(report: Preflight) -> str:
    header = ("group", "tensors", "parameters", "learning rate", "weight decay")
    rows = [
        (one.name, f"{one.tensors:,}", f"{one.parameters:,}", f"{one.learning_rate:g}", f"{one.weight_decay:g}")
        for one in report.groups
    ]
    return table(header, rows)


def _adapters(report: Preflight) -> str:
    lines = []
    for part in report.parts:
        if part.num_adapted:
            more = ", ..." if part.num_adapted > len(part.adapted) else ""
            lines.append(f"  {part.name}: {part.num_adapted} modules: {', '.join(part.adapted)}{more}")
    return "\n".join(lines)


def _sources(sources: Sequence[SourceFacts]) -> str:
    if not sources:
        return ""
    header = ("source", "rows", "used", "an epoch", "left out")
    rows = []
    for one in sources:
        reasons = [f"{count:,} {reason}" for reason, count in one.dropped.items()]
        reasons += [f"{one.unreadable:,} unreadable (listed when the run starts)"] if one.unreadable else []
        name = str(Path(*Path(one.path).parts[-2:]))
        rows.append((name, f"{one.rows:,}", f"{one.used:,}", f"{one.per_epoch:,}", "; ".join(reasons) or "none"))
    return table(header, rows)


def _lengths(lengths: LengthFacts) -> str:
    at_most = " at most" if lengths.measure == "bounded" else ""
    lines = [
        f"  shortest {lengths.shortest:,}, median {lengths.median:,}, longest {lengths.longest:,}, "
        f"all {lengths.total:,}{at_most}"
    ]
    width, most = len(f"{lengths.edges[-1]:,}"), max(lengths.counts)
    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        bar = "#" * -(-BAR * count // most)
        lines.append(f"  {low:>{width},} - {high - 1:>{width},}  {bar:<{BAR}}  {count:,}")
    return "\n".join(lines)


def _plan(report: Preflight) -> str:
    plan = report.plan
    empty = "free places in packs" if plan.batching == "packed" else "padding"
    rows = f"{plan.fewest_rows:,} to {plan.most_rows:,}" if plan.fewest_rows < plan.most_rows else plan.most_rows
    ranks = "1 rank" if plan.world_size == 1 else f"each of {plan.world_size:,} ranks"
    lines = [
        f"  batching: {plan.batching}; {_count(plan.micro_batches, 'micro-batch', 'es')} on {ranks}, of {rows} rows",
        f"  {empty}: {plan.empty_share:.1%} of {plan.slots:,}; the largest micro-batch computes {plan.most_tokens:,}",
    ]
    if plan.world_size > 1:
        lines.append(f"  the fullest rank of a step has {plan.imbalance:.1%} more tokens than the mean")
    return "\n".join(lines)


def _steps(report: Preflight) -> str:
    steps = report.steps
    lines = [
        f"  {steps.total:,} steps, {steps.per_epoch:,} an epoch, {steps.epochs:.3g} epochs",
        f"  {steps.rows_per_step:,.1f} rows and {steps.tokens_per_step:,.0f} tokens a step",
    ]
    if steps.is_finished:
        lines.append("  this run is finished: its model is there")
    elif steps.goes_on_from:
        lines.append(f"  goes on from {steps.goes_on_from}")
    return "\n".join(lines)


def _memory(report: Preflight) -> str:
    memory = report.memory
    names = ("weights", "gradients", "optimizer", "activations", "logits", "batch", "total")
    lines = [f"  {name:<12}{_size(getattr(memory, name)):>12}" for name in names]
    return "\n".join([*lines, f"  sharding: {memory.sharding}; the formula is in docs/training.md"])


def _batch(report: Preflight) -> str:
    batch = report.batch
    lines = [f"  {name}: {shape}" for name, shape in batch.shapes.items()]
    lines.append(f"  row {batch.row} of {batch.source}: {batch.tokens:,} tokens, {batch.learned:,} learned: [[...]]")
    return "\n".join([*lines, "", batch.text])


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def _size(number: int) -> str:
    """Bytes as a person reads them.

    Example: "1.50 GiB", "20.0 MiB".
    """
    return f"{number / GIB:,.2f} GiB" if number >= GIB else f"{number / 2**20:,.2f} MiB"
