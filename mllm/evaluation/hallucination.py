"""What answers about the digits world name that is not there. Pure functions of texts and rows.

After CHAIR (arXiv 1809.02156) for captions, and POPE (arXiv 2305.10355) for questions about presence. A row's `meta`
lists the scene (`digits`, `colours`) and the reference `answer`. Where a thing stands is not judged here: that does
`mllm.evaluation.digits`.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mllm.evaluation.digits import score

COLOURS = frozenset({"red", "orange", "yellow", "green", "blue", "purple", "white"})
"""Those of the digits world."""
OTHER_COLOURS = frozenset(
    {"black", "brown", "cyan", "gold", "gray", "grey", "magenta", "pink", "silver", "teal", "turquoise", "violet"}
)
"""Never there, so that naming one is always wrong."""
WORD = re.compile(r"\d+|[a-z]+")


class Named(NamedTuple):
    """What one caption names, against its scene.

    Args:
        digits: Mentions of digits. One that is named twice is two mentions.
        absent_digits: Those of digits that are nowhere in the picture.
        colours: Mentions of colours.
        absent_colours: Those of colours that nothing in the picture has.
        there: Different digits and colours in the picture.
        found: Those of them that are named.
    """

    digits: int
    absent_digits: int
    colours: int
    absent_colours: int
    there: int
    found: int


def names_in(caption: str) -> list[str]:
    """The digits and colours that a text names, in order. `55` is one name: that of no digit."""
    words = WORD.findall(caption.lower())
    return [word for word in words if word.isdigit() or word in COLOURS or word in OTHER_COLOURS]


def compare(caption: str, meta: dict[str, Any]) -> Named:
    """Hold what a caption names against its scene."""
    there = {str(digit) for digit in meta["digits"]} | set(meta["colours"])
    named = names_in(caption)
    digits = [name for name in named if name.isdigit()]
    colours = [name for name in named if not name.isdigit()]
    return Named(
        len(digits),
        sum(name not in there for name in digits),
        len(colours),
        sum(name not in there for name in colours),
        len(there),
        len(there & set(named)),
    )


def hallucination(task: str, answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How much the answers of a task name that is not there; {} for tasks in which nothing can be named.

    Of captions:
        hallucinated_captions: Share of captions with such a mention (CHAIRs).
        hallucinated_mentions: Share of all mentions of digits and colours (CHAIRi).
        hallucinated_digits, hallucinated_colours: The same, of each alone.
        mentioned_recall: Share of the digits and colours in the pictures that are named: who says less errs less.
        mentions: By the caption.

    Of presence, "yes" being what is looked for:
        presence_precision, presence_recall, presence_f1, presence_yes_share.

    Raises:
        ValueError: There is no row, or not one answer for each.
    """
    if not rows or len(answers) != len(rows):
        raise ValueError(f"{len(answers)} answers for {len(rows)} rows; one is needed for each, and at least one")
    if task == "caption":
        return _of_captions([compare(one, row["meta"]) for one, row in zip(answers, rows, strict=True)])
    if task == "presence":
        return _of_presence(answers, rows)
    return {}


def _of_captions(found: Sequence[Named]) -> dict[str, float]:
    total = Named(*map(sum, zip(*found, strict=True)))
    mentions, absent = total.digits + total.colours, total.absent_digits + total.absent_colours
    return {
        "hallucinated_captions": sum(one.absent_digits + one.absent_colours > 0 for one in found) / len(found),
        "hallucinated_mentions": absent / max(mentions, 1),
        "hallucinated_digits": total.absent_digits / max(total.digits, 1),
        "hallucinated_colours": total.absent_colours / max(total.colours, 1),
        "mentioned_recall": total.found / max(total.there, 1),
        "mentions": mentions / len(found),
    }


def _of_presence(answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """An answer that is neither yes nor no counts as a wrong yes to precision, and as no yes to recall."""
    said = [answer.strip() for answer in answers]
    asked = [row["meta"]["answer"] == "yes" for row in rows]
    right = sum(answer == "yes" and is_there for answer, is_there in zip(said, asked, strict=True))
    return {
        "presence_precision": right / max(sum(answer != "no" for answer in said), 1),
        "presence_recall": right / max(sum(asked), 1),
        **score("presence", answers, rows),
        "presence_yes_share": said.count("yes") / len(said),
    }
