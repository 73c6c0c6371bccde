"""Scores of the digits world: what an answer says, set against the scene. Pure functions of texts and rows.

A row's `meta` holds the reference `answer`; of a caption it lists the scene, too (`digits`, `colours`, `places`, in
parallel).
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

TASKS = ("caption", "position", "count", "presence", "color")
"""About pictures."""
TASKS_OF = {"image": TASKS, "video": ("motion", "order"), "audio": ("beeps", "glide", "tones", "match")}
"""By what they need to be seen or heard; "match" needs a picture and a sound."""
METRICS = {
    "caption": ("caption_digit_recall", "caption_digit_precision", "caption_color_accuracy"),
    "position": ("position_accuracy",),
    "count": ("count_accuracy",),
    "presence": ("presence_f1",),
    "color": ("color_accuracy",),
    "motion": ("motion_accuracy",),
    "order": ("order_accuracy",),
    "beeps": ("beeps_accuracy",),
    "glide": ("glide_accuracy",),
    "tones": ("tones_accuracy",),
    "match": ("match_accuracy",),
}
"""What `score` returns for each task."""
MENTION = re.compile(r"an? ([a-z]+) ([0-9]) in the ((?:top|middle|bottom) (?:left|centre|right))")


class Counts(NamedTuple):
    """What a caption got right.

    Args:
        things: Digits in the scene.
        mentions: Things the caption mentions, parts that cannot be read included.
        placed: Mentions of a place at which something stands; of several, the first.
        right: Those of `placed` that name the digit.
        coloured: Those of `right` that name its colour, too.
    """

    things: int
    mentions: int
    placed: int
    right: int
    coloured: int


def score(task: str, answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The metrics of one task, each from 0 to 1.

    Raises:
        ValueError: The task is unknown, there is no row, or not one answer for each row.
    """
    if task not in METRICS:
        raise ValueError(f"unknown task {task!r}; it must be one of {', '.join(METRICS)}")
    if not rows or len(answers) != len(rows):
        raise ValueError(f"{len(answers)} answers for {len(rows)} rows; score needs one each, and at least one")
    if task == "caption":
        return _caption_metrics([score_caption(a, row["meta"]) for a, row in zip(answers, rows, strict=True)])
    return _metrics(task, [answer.strip() for answer in answers], rows)


def score_caption(answer: str, meta: dict[str, Any]) -> Counts:
    """Compare a caption with its scene. A place named twice counts once; a part that is no mention counts as wrong."""
    scene = {
        place: (digit, colour)
        for place, digit, colour in zip(meta["places"], meta["digits"], meta["colours"], strict=True)
    }
    parts = _split_caption(answer)
    said: dict[str, tuple[int, str]] = {}
    for part in parts:
        found = MENTION.fullmatch(part)
        if found and found[3] in scene:
            said.setdefault(found[3], (int(found[2]), found[1]))
    right = [place for place, (digit, _) in said.items() if digit == scene[place][0]]
    coloured = sum(said[place][1] == scene[place][1] for place in right)
    return Counts(len(scene), len(parts), len(said), len(right), coloured)


def best_constant(task: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the best answer that never looks scores, metric by metric.

    For captions the candidates are every reference and one mention of the likeliest digit at each place.
    """
    values = list(Counter(row["meta"]["answer"] for row in rows))
    if task == "caption":
        scores = [score(task, [text] * len(rows), rows) for text in [*values[:50], _likeliest_caption(rows)]]
    else:
        scores = [_metrics(task, [value] * len(rows), rows) for value in values]
    return {name: max(found[name] for found in scores) for name in METRICS[task]}


def _metrics(task: str, answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy, or for presence F1, of answers that must equal the reference."""
    references = [row["meta"]["answer"] for row in rows]
    if task == "presence":
        return {"presence_f1": _f1(answers, references)}
    return {METRICS[task][0]: sum(a == b for a, b in zip(answers, references, strict=True)) / len(rows)}


def _split_caption(answer: str) -> list[str]:
    """The mentions of `There is A, B and C.`; a text of another form is one part, which is no mention."""
    text = answer.strip()
    if not (text.startswith("There is ") and text.endswith(".")):
        return [text] if text else []
    return re.split(r", | and ", text.removeprefix("There is ").removesuffix("."))


def _caption_metrics(counts: Sequence[Counts]) -> dict[str, float]:
    """Over all things and mentions together. Colours are judged where the digit was right."""
    total = Counts(*map(sum, zip(*counts, strict=True)))
    return {
        "caption_digit_recall": total.right / max(total.things, 1),
        "caption_digit_precision": total.right / max(total.mentions, 1),
        "caption_color_accuracy": total.coloured / max(total.right, 1),
    }


def _f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """F1 of `yes`. An answer that is neither yes nor no counts against it, whatever the reference is."""
    said_right = sum(answer == "yes" == reference for answer, reference in zip(answers, references, strict=True))
    said = sum(answer != "no" for answer in answers)
    asked = sum(reference == "yes" for reference in references)
    return 2 * said_right / (said + asked) if said + asked else 0.0


def _likeliest_caption(rows: Sequence[dict[str, Any]]) -> str:
    """A caption that mentions, at every place, what stands there most often."""
    seen: dict[str, Counter] = {}
    for row in rows:
        meta = row["meta"]
        for place, digit, colour in zip(meta["places"], meta["digits"], meta["colours"], strict=True):
            seen.setdefault(place, Counter())[f"a {colour} {digit} in the {place}"] += 1
    return "There is " + ", ".join(counter.most_common(1)[0][0] for counter in seen.values()) + "."
