"""One self-contained web page: findings, tables, charts and rows. It needs no network and runs no script."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from mllm.data.auditing.audit_findings import findings
from mllm.data.auditing.audit_record import SourceAudit
from mllm.data.auditing.charts import Chart
from mllm.data.auditing.render import Side, Token, render_row
from mllm.data.auditing.row_text import visible
from mllm.data.auditing.thumbnails import Thumbnail, thumbnail
from mllm.data.schema import Row
from mllm.processing import MllmProcessor

HEADINGS = {
    "": "",
    "chosen": "Chosen: the better answer",
    "rejected": "Rejected: the worse answer",
    "contrast": "Contrast: under these media the chosen answer is the worse one",
}


@dataclass(frozen=True)
class SideView:
    """A side with its pictures, as the template reads it."""

    title: str
    heading: str
    tokens: list[Token]
    thumbnails: list[Thumbnail]
    length: int
    num_learned: int
    problem: str


@dataclass(frozen=True)
class RowView:
    """A row as the template reads it."""

    id: str
    source: str
    where: str
    notes: list[str]
    has_boxes: bool
    sides: list[SideView]


def inspection_page(
    title: str,
    *,
    facts: Sequence[str] = (),
    audits: Sequence[SourceAudit] = (),
    rows: Sequence[RowView] = (),
    charts: Sequence[Chart] = (),
    has_tokens: bool = False,
    max_length: int | None = None,
) -> str:
    """The page's HTML. Whatever the data hold, it is shown as text.

    Args:
        title: Stands on top.
        facts: Said below it: sources, processor, date.
        audits: Findings and tables.
        rows: Shown token by token.
        charts: Shown as pictures.
        has_tokens: Whether `rows` come from a processor.
        max_length: Rows that are longer are marked.
    """
    environment = jinja2.Environment(
        autoescape=True, finalize=_finalized, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    text = resources.files("mllm.data.auditing").joinpath("templates/inspect.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        title=title,
        facts=facts,
        audits=audits,
        findings=findings(audits),
        rows=rows,
        charts=charts,
        has_tokens=has_tokens,
        has_boxes=any(row.has_boxes for row in rows),
        max_length=max_length,
    )


def _finalized(value: Any) -> Any:
    """What the template prints of a value, before it is escaped: no character that a reader would not see."""
    return visible(value) if isinstance(value, str) else value


def row_view(row: Row, processor: MllmProcessor | None = None) -> RowView:
    """A row as the page shows it: encoded, with thumbnails of its media."""
    notes = [f"boxes as {row.coordinates}"] if row.coordinates else []
    if processor is not None and row.coordinates:
        notes = [f"boxes moved from {row.coordinates} to what is seen"]
    sides = render_row(row, processor)
    return RowView(
        row.id,
        row.source,
        row.where,
        notes,
        bool(row.coordinates),
        [_side_view(side, row, processor) for side in sides],
    )


def _side_view(side: Side, row: Row, processor: MllmProcessor | None) -> SideView:
    # Of several images nobody could tell from the picture which one a box belongs to.
    texts = tuple(_texts(side)) if row.coordinates and len(side.media) == 1 else ()
    thumbnails = [thumbnail(item, processor, texts=texts) for item in side.media]
    return SideView(
        side.title, HEADINGS[side.title], side.tokens, thumbnails, side.length, side.num_learned, side.problem
    )


def _texts(side: Side) -> list[str]:
    contents = [message["content"] for message in side.messages]
    return [
        text
        for content in contents
        for text in ([content] if isinstance(content, str) else [item.get("text") or "" for item in content])
    ]
