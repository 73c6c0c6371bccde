"""Charts of `mllm.data.auditing.statistics` as PNG. matplotlib is imported when one is drawn."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm.data.auditing.statistics import BatchSize, RowSize, Statistics
from mllm.errors import OptionError

COLOURS = {"learned": "#2e8b57", "read": "#4a86c8", "media": "#e0a030", "padding": "#c8ccd0"}
SOURCE_COLOURS = ("#4a86c8", "#e0a030", "#2e8b57", "#a05ab4", "#c8503c", "#50a0a0", "#8c8c3c", "#785a50")
MAX_SOURCES = len(SOURCE_COLOURS)


@dataclass(frozen=True)
class Chart:
    """A picture, and a sentence that says what it shows."""

    png: bytes
    caption: str

    @property
    def url(self) -> str:
        """The picture as a `data:` URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


def statistics_charts(found: Statistics, *, max_length: int | None = None) -> list[Chart]:
    """All charts of some statistics.

    Raises:
        OptionError: matplotlib is not installed.
    """
    lengths = f"How long {len(found.sizes):,} rows are, in {found.unit}, by source."
    batches = f"What the first {len(found.batches):,} batches of {found.batch_size} rows hold when each is padded to "
    batches += "its longest row, and which sources their rows come from."
    names = _top_sources([size.source for size in found.sizes])
    return [
        Chart(length_chart(found.sizes, names, unit=found.unit, max_length=max_length), lengths),
        Chart(batch_chart(found.batches, names, unit=found.unit), batches),
    ]


def length_chart(sizes: Sequence[RowSize], names: Sequence[str], *, unit: str, max_length: int | None = None) -> bytes:
    """A histogram of row lengths, the sources on top of each other.

    Args:
        sizes: Of the rows.
        names: Of the sources that have a colour; the others are "others" together.
        unit: "tokens" or "words".
        max_length: Drawn as a line.
    """
    figure, axes = _figure(1)
    axis = axes[0]
    lengths = [size.length for size in sizes]
    edges = np.linspace(0, max([*lengths, 1]), 50).tolist()
    parts = [[size.length for size in sizes if _named(size.source, names) == name] for name in names]
    axis.hist(
        parts, bins=edges, stacked=True, color=SOURCE_COLOURS[: len(names)], label=[_plain(name) for name in names]
    )
    if max_length is not None:
        axis.axvline(max_length, color="#c62828", linestyle="--", label=f"max_length = {max_length:,}")
    axis.set_xlabel(f"{unit} in a row")
    axis.set_ylabel("rows")
    axis.legend(fontsize=8)
    return _png(figure)


def batch_chart(batches: Sequence[BatchSize], names: Sequence[str], *, unit: str) -> bytes:
    """What each batch is made of: kinds of tokens above, sources below."""
    figure, (upper, lower) = _figure(2)
    numbers = range(1, len(batches) + 1)
    floor = np.zeros(len(batches))
    labels = {"learned": "learned", "read": "read only", "media": "media", "padding": "padding"}
    for kind, label in labels.items():
        values = np.array([getattr(batch, kind) for batch in batches], dtype=float)
        upper.bar(numbers, values, bottom=floor, width=1.0, color=COLOURS[kind], label=label)
        floor += values
    floor = np.zeros(len(batches))
    for name, colour in zip(names, SOURCE_COLOURS, strict=False):
        values = np.array(
            [
                sum(count for source, count in batch.sources.items() if _named(source, names) == name)
                for batch in batches
            ],
            dtype=float,
        )
        lower.bar(numbers, values, bottom=floor, width=1.0, color=colour, label=_plain(name))
        floor += values
    upper.set_ylabel(f"{unit} in a batch")
    lower.set_ylabel("rows in a batch")
    for axis in (upper, lower):
        axis.set_xlabel("batch, in the order of the first epoch")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _top_sources(sources: Sequence[str]) -> list[str]:
    """The most frequent ones, and "others" if there are more than colours."""
    names, counts = np.unique(np.array(sources, dtype=object).astype(str), return_counts=True)
    ordered = [str(names[place]) for place in np.argsort(-counts, kind="stable")]
    return ordered if len(ordered) <= MAX_SOURCES else [*ordered[: MAX_SOURCES - 1], "others"]


def _named(source: str, names: Sequence[str]) -> str:
    return source if source in names else "others"


def _plain(name: str) -> str:
    """A name that matplotlib takes for neither mathematics nor a label to be hidden."""
    return " " + name.replace("$", r"\$") or "(no name)"


def _figure(rows: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "charts, and no matplotlib",
            expected="matplotlib, which draws them",
            do="pip install matplotlib",
        ) from error
    figure = Figure(figsize=(9.5, 3.4 * rows), dpi=100, layout="constrained")
    return figure, [figure.add_subplot(rows, 1, number + 1) for number in range(rows)]


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
