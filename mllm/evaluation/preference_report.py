"""What preference training changed on the digits world: before and after, over methods and seeds, in one table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEFORE = "before"
"""The model that every method starts from."""
SHOWN = {
    "hallucinated_mentions": "caption: mentions of what is not there",
    "hallucinated_captions": "caption: captions with such a mention",
    "hallucinated_digits": "caption: mentions of digits that are not there",
    "hallucinated_colours": "caption: mentions of colours that are not there",
    "mentioned_recall": "caption: digits and colours there that are named",
    "mentions": "caption: mentions each",
    "caption_digit_recall": "caption: digits named at the right place",
    "caption_digit_precision": "caption: mentions of the right digit and place",
    "presence_precision": "presence: precision of yes",
    "presence_recall": "presence: recall of yes",
    "presence_f1": "presence: F1 of yes",
    "presence_yes_share": "presence: answers that are yes (half should be)",
    "position_accuracy": "digit at an asked place",
    "count_accuracy": "count",
    "color_accuracy": "colour of a digit",
}
"""Figures of the table, and what they are called there."""
BY_SEED = ("hallucinated_mentions", "mentioned_recall")
"""What is shown seed by seed, too."""
LEAST_REDUCTION, MOST_RECALL_LOST = 0.3, 0.02
"""Of hallucinated mentions, relative; of recall, absolute: what counts as a success."""

Scores = Mapping[str, Mapping[str, float]]
"""Of each model (`BEFORE` and the methods) its figures by name."""


def read_scores(evaluation: Path) -> dict[str, float]:
    """All figures of a model by name, from what scripts/evaluate_model.py wrote."""
    tasks = json.loads(evaluation.read_text(encoding="utf-8"))["tasks"]
    return {name: value for task in tasks.values() for name, value in (task["model"] | task["hallucination"]).items()}


def summarize(seeds: Mapping[int, Scores]) -> dict[str, Any]:
    """Means over seeds, and what each method changed.

    Args:
        seeds: By seed, the scores of the same models.

    Returns:
        `mean`, figures by model; `seeds`, as given; `change`, of each method: `reduction` of the hallucinated
        mentions, relative to before, `reductions` by seed, `recall`, what was gained of it, and `holds`, whether both
        are within `LEAST_REDUCTION` and `MOST_RECALL_LOST`.
    """
    first = next(iter(seeds.values()))
    mean = {
        model: {name: sum(scores[model][name] for scores in seeds.values()) / len(seeds) for name in figures}
        for model, figures in first.items()
    }
    change = {}
    for method in (model for model in first if model != BEFORE):
        reduction, recall = _reduction(mean, method), _recall_gained(mean, method)
        change[method] = {
            "reduction": reduction,
            "reductions": {str(seed): _reduction(scores, method) for seed, scores in seeds.items()},
            "recall": recall,
            "holds": reduction >= LEAST_REDUCTION and recall >= -MOST_RECALL_LOST,
        }
    return {"mean": mean, "change": change, "seeds": {str(seed): dict(scores) for seed, scores in seeds.items()}}


def format_table(report: Mapping[str, Any]) -> str:
    """A report of `summarize` as Markdown."""
    models = list(report["mean"])
    lines = [_line(f"mean of seeds {', '.join(report['seeds'])}", models), _line("---", ["---"] * len(models))]
    for name, words in SHOWN.items():
        if name not in report["mean"][BEFORE]:
            continue
        lines.append(_line(words, [f"{report['mean'][model][name]:.3f}" for model in models]))
        if name in BY_SEED:
            for seed, scores in report["seeds"].items():
                lines.append(_line(f"- seed {seed}", [f"{scores[model][name]:.3f}" for model in models]))
    for words, cell in (
        ("fewer mentions of what is not there", lambda change: f"{change['reduction']:+.0%}"),
        ("recall gained", lambda change: f"{change['recall']:+.3f}"),
    ):
        lines.append(_line(words, [cell(report["change"][model]) if model != BEFORE else "" for model in models]))
    return "\n".join(lines)


def _reduction(scores: Scores, method: str) -> float:
    before = scores[BEFORE]["hallucinated_mentions"]
    return (before - scores[method]["hallucinated_mentions"]) / before if before else 0.0


def _recall_gained(scores: Scores, method: str) -> float:
    return scores[method]["mentioned_recall"] - scores[BEFORE]["mentioned_recall"]


def _line(first: str, cells: list[str]) -> str:
    return "| " + " | ".join([first, *cells]) + " |"
