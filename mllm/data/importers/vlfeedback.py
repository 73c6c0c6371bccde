"""VLFeedback: four rated answers to a question, made into pairs by a stated rule.

An answer's score is the mean of its ratings; an answer with a rating that is no number has no score and makes no pair.
Of two answers the one with the higher score is chosen; a tie, or a difference below `min_margin`, makes no pair. Which
answers meet is option `pairs`:

    all          every two answers (six pairs of four answers): as the authors trained
    best_worst   the best and the worst
    adjacent     neighbours in the ranking (up to three pairs)
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from mllm.data.importers.base import Drop, Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import (
    LEFT_OUT,
    SAME_ANSWERS,
    has_keys,
    media_first,
    media_items,
    pair_row,
    rest_of,
    text_of,
)
from mllm.data.sources import Source
from mllm.errors import OptionError

OPTIONS = {"pairs": "all", "min_margin": 0.0}
PAIRS = ("all", "best_worst", "adjacent")
USED = ("id", "prompt", "models", "completions", "img_path")
UNRATED = "an answer without numeric ratings"
TIE = "a tie"
CLOSE = "a difference below min_margin"


class Rated(NamedTuple):
    """An answer, who gave it, and the mean of its ratings."""

    text: str
    model: str
    score: float


def matches(fields: Any, source: Source) -> bool:
    """Whether a record has VLFeedback's keys; nobody else has `completions` beside an `img_path`."""
    return has_keys(fields, "prompt", "completions", "img_path")


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """A row for each pair, best pairs first. What made no pair is counted in the first row's meta.

    Raises:
        Drop: No pair is left: fewer than two rated answers, or nothing but ties and close calls.
        OptionError: `pairs` or `min_margin` is wrong.
    """
    rule, margin = _options(source)
    fields = record.fields
    media, prompt = media_items(fields["img_path"]), text_of(fields, "prompt")
    answers, left_out = rated_answers(fields["completions"])
    pairs = choose_pairs(answers, rule, margin, left_out)
    if not pairs:
        raise Drop(next(iter(left_out)) if len(left_out) == 1 else "no two answers of clearly different rating")
    for number, (better, worse) in enumerate(pairs):
        meta = {
            **rest_of(fields, USED),
            **{f"{key}_chosen": value for key, value in (("score", better.score), ("model", better.model))},
            **{f"{key}_rejected": value for key, value in (("score", worse.score), ("model", worse.model))},
        }
        if number == 0 and left_out:
            meta[LEFT_OUT] = dict(left_out)
        row = pair_row(
            record,
            messages=[{"role": "user", "content": media_first(prompt, media)}],
            media=media,
            chosen=better.text,
            rejected=worse.text,
            meta=meta,
        )
        yield row if len(pairs) == 1 else {**row, "id": f"{row['id']}/{number}"}


def rated_answers(completions: Any) -> tuple[list[Rated], Counter[str]]:
    """The answers that have a score, best first (ties in published order), and how many have none."""
    left_out: Counter[str] = Counter()
    answers = []
    for completion in _as_list(completions):
        score = _score(completion.get("annotations"))
        if score is None:
            left_out[UNRATED] += 1
        else:
            answers.append(Rated(text_of(completion, "response"), str(completion.get("model") or ""), score))
    return sorted(answers, key=lambda answer: -answer.score), left_out


def choose_pairs(answers: list[Rated], rule: str, margin: float, left_out: Counter[str]) -> list[tuple[Rated, Rated]]:
    """Better and worse answers by the rule, largest difference first; pairs that fall out are added to `left_out`."""
    if len(answers) < 2:
        return []
    if rule == "all":
        candidates = list(combinations(answers, 2))
    elif rule == "best_worst":
        candidates = [(answers[0], answers[-1])]
    else:
        candidates = list(pairwise(answers))
    pairs = []
    for better, worse in candidates:
        difference = better.score - worse.score
        if better.score == worse.score:
            left_out[TIE] += 1
        elif difference < margin:
            left_out[CLOSE] += 1
        elif better.text == worse.text:
            left_out[SAME_ANSWERS] += 1
        else:
            pairs.append((better, worse))
    return sorted(pairs, key=lambda pair: pair[1].score - pair[0].score)


def _options(source: Source) -> tuple[str, float]:
    options = {**OPTIONS, **source.options}
    rule, margin = options["pairs"], options["min_margin"]
    if rule not in PAIRS:
        raise OptionError(f"pairs = {rule!r}", expected=f"one of {', '.join(PAIRS)}", do="correct the option")
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise OptionError(f"min_margin = {margin!r}", expected="a number, 0 or more", do="correct the option")
    return str(rule), float(margin)


def _as_list(completions: Any) -> list[Mapping[str, Any]]:
    """The answers one by one: the JSONL lists them; the parquet of the Hub holds a list for each of their keys."""
    if isinstance(completions, Mapping):
        columns = list(completions.values())
        if not columns or any(not isinstance(column, list) or len(column) != len(columns[0]) for column in columns):
            raise ImportProblem("completions with lists of unequal length; expected one entry an answer in each")
        completions = [dict(zip(completions, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not isinstance(completions, list) or any(not isinstance(item, Mapping) for item in completions):
        raise ImportProblem(f"completions = {completions!r:.60}; expected a list of answers with their annotations")
    return completions


def _score(annotations: Any) -> float | None:
    """Mean rating over all aspects; None where one of them is no number ("N/A", missing)."""
    if not isinstance(annotations, Mapping) or not annotations:
        return None
    ratings = []
    for aspect in annotations.values():
        try:
            ratings.append(float(aspect["Rating"]))
        except (TypeError, KeyError, ValueError):
            return None
    return sum(ratings) / len(ratings) if all(map(math.isfinite, ratings)) else None


IMPORTER = Importer(
    name="vlfeedback",
    about="VLFeedback: four rated answers (completions) to a prompt; pairs by options `pairs` and `min_margin`",
    matches=matches,
    convert=convert,
    options=OPTIONS,
)
