"""Pairs as a web page: both images, both answers, and what differs between them marked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from mllm.data.auditing.row_text import visible
from mllm.data.auditing.thumbnails import Thumbnail, thumbnail
from mllm.data.schema import MediaItem
from mllm.preference_data.answered import Answered
from mllm.preference_data.outcomes import Outcome
from mllm.preference_data.phrases import Phrase, changed_words

Run = tuple[str, bool]
"""A piece of a text, and whether it is marked."""


@dataclass(frozen=True)
class PairView:
    """A pair as the template reads it.

    Args:
        id: Of its row.
        facts: Said below it.
        question: The text in front of the answers.
        chosen: With what was masked marked.
        rejected: With what is new marked.
        own: The row's image.
        retrieved: The other one.
    """

    id: str
    facts: str
    question: str
    chosen: Sequence[Run]
    rejected: Sequence[Run]
    own: Thumbnail
    retrieved: Thumbnail


def pair_view(answered: Answered, retrieved: MediaItem, outcome: Outcome) -> PairView:
    """A pair as the page shows it."""
    told = [answered.row.source] if answered.row.source else []
    told.append(f"image {len(outcome.tries)} of those that look most like its own, cosine {outcome.cosine:.3f}")
    told.append(f"similarity of the answers {outcome.similarity:.3f}")
    return PairView(
        answered.row.id,
        " · ".join(told),
        _question(answered),
        runs(answered.answer, outcome.phrases),
        runs(outcome.rejected, changed_words(answered.answer, outcome.rejected)),
        thumbnail(answered.image),
        thumbnail(retrieved),
    )


def examples_page(views: Sequence[PairView], report: Mapping[str, Any], *, title: str, facts: Sequence[str]) -> str:
    """The page's HTML: one file that needs neither network nor script. Whatever the data hold is shown as text.

    Args:
        views: The pairs.
        report: As `report_of` made it.
        title: Stands on top.
        facts: Said below it.
    """
    environment = jinja2.Environment(
        autoescape=True, finalize=_finalized, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("mllm.preference_data").joinpath("templates/examples.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(views=views, report=report, title=title, facts=facts)


def runs(text: str, marked: Sequence[Phrase]) -> list[Run]:
    """A text in pieces, in turn plain and marked.

    Example: "a red cup" with the phrase "red" gives ("a ", False), ("red", True), (" cup", False).
    """
    pieces: list[Run] = []
    end = 0
    for phrase in marked:
        pieces += [(text[end : phrase.start], False), (text[phrase.start : phrase.end], True)]
        end = phrase.end
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]]


def _question(answered: Answered) -> str:
    texts = []
    for message in answered.messages:
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        words = "".join(item["text"] if item["type"] == "text" else "<image>" for item in items)
        texts.append(f"{message['role']}: {words}")
    return "\n".join(texts)


def _finalized(value: Any) -> Any:
    """What the template prints of a value, before it is escaped: no character that a reader would not see."""
    return visible(value) if isinstance(value, str) else value
