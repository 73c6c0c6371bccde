"""What a model knows from fewer visual tokens, beside what it knows from all: rows for a report, and a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from mllm.errors import OptionError
from mllm.evaluation.digits import METRICS
from mllm.pruning import Pruner

Scores = Mapping[str, Mapping[str, float]]
"""Of each task its metrics, as `mllm.evaluation.digits.score` gives them."""


def accuracy(scores: Scores) -> float:
    """One figure for all tasks: the mean of the first metric of each."""
    return sum(scores[task][METRICS[task][0]] for task in scores) / len(scores)


def pruned_case(spec: str, pruner: Pruner, scores: Scores, *, whole: Scores) -> dict[str, Any]:
    """What one pruner did to the answers.

    Args:
        spec: What the pruner was built from.
        pruner: Its last prompt tells how many tokens an item has.
        scores: Of the answers under it.
        whole: Of the answers without it, to the same rows.

    Returns:
        `pruner`, `method`, `tokens` (of an item, as asked for), `seen` (by layers, on average) and `of`, `accuracy`,
        `kept` (its share of the unpruned one), `tasks`.

    Raises:
        OptionError: The last prompt had no visual tokens.
    """
    statistics = pruner.statistics
    lengths = [item.num_tokens for row in statistics.items for item in row]
    if not lengths:
        raise OptionError(
            f"pruner {spec!r}, of answers to rows without pictures and videos",
            expected="tasks about pictures or videos",
            do="choose other tasks, or leave the pruner out",
        )
    of = lengths[0]
    counts = pruner.counts(of, len(statistics.tokens_per_layer))
    reached, unpruned = accuracy(scores), accuracy(whole)
    return {
        "pruner": spec,
        "method": spec.split()[0],
        "tokens": pruner.budget(of),
        "seen": sum(counts) / len(counts),
        "of": of,
        "accuracy": reached,
        "kept": reached / unpruned if unpruned else 0.0,
        "tasks": {task: dict(metrics) for task, metrics in scores.items()},
    }


def format_table(cases: Sequence[Mapping[str, Any]], *, unpruned: float) -> str:
    """Methods, with the options they had, against budgets, as text for a terminal; in the order of the cases.

    Args:
        cases: Of `pruned_case`.
        unpruned: The accuracy with all tokens.
    """
    found = {(without_budget(case["pruner"]), case["tokens"]): case["accuracy"] for case in cases}
    methods, budgets = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    whole = cases[0]["of"]
    width = max(28, *(len(method) + 1 for method in methods))
    head = [f"{budget} of {whole}" for budget in budgets]
    lines = [f"{'visual tokens':<{width}}" + "".join(f"{cell:>12}" for cell in [*head, f"all {whole}"])]
    for method in methods:
        cells = [f"{found[method, budget]:.3f}" if (method, budget) in found else "" for budget in budgets]
        lines.append(f"{method:<{width}}" + "".join(f"{cell:>12}" for cell in [*cells, f"{unpruned:.3f}"]))
    return "\n".join(lines)


def without_budget(spec: str) -> str:
    """A method and its options, the same for all budgets: "visiondrop ranking=language"."""
    return " ".join(word for word in spec.split() if not word.startswith("tokens="))
