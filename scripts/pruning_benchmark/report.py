"""What was measured, as a table and as a plot."""

from pathlib import Path
from typing import Any

COLUMNS: dict[str, tuple[str, str]] = {
    "method": ("method", ""),
    "tokens": ("tokens", "d"),
    "accuracy": ("accuracy", ".3f"),
    "ttft_seconds": ("first token, s", ".3g"),
    "ttft_gain": ("x faster", ".2f"),
    "flops_gain": ("x fewer FLOPs", ".2f"),
    "flops_gain_done": ("without skipped", ".2f"),
    "flops_gain_planned": ("foretold", ".2f"),
    "of_flops_gain": ("reached", ".0%"),
    "selection_share": ("deciding", ".1%"),
    "pruner_share": ("all its work", ".1%"),
    "text_ttft_gain": ("LLM alone, x faster", ".2f"),
    "text_flops_gain": ("x fewer FLOPs", ".2f"),
    "decode_tokens_per_second": ("tokens/s after", ".1f"),
    "end_to_end_gain": ("whole answer, x faster", ".2f"),
    "peak_mib": ("peak, MiB", ".0f"),
    "cache_mib": ("cache, MiB", ".2f"),
}
"""Keys of a case: headings, and how figures are written."""
MARKERS = "osD^v"
"""Of budgets, the smallest first."""


def table(cases: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Markdown: what was measured on what, and a table for each subject."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    text = f"{where}; {versions}; {machine['time']}; load before {machine['load_before']:.2f}\n"
    for subject, batch in dict.fromkeys((case["subject"], case["batch"]) for case in cases):
        own = [case for case in cases if (case["subject"], case["batch"]) == (subject, batch)]
        text += f"\n{subject}, {own[0]['of']} visual tokens a picture, batch of {batch}\n\n" + _rows(own)
    return text


def draw(cases: list[dict[str, Any]], path: Path) -> bool:
    """Draw accuracy against time; where nothing was scored, time against arithmetic. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    measured = [case for case in cases if "refused" not in case]
    subjects = dict.fromkeys((case["subject"], case["batch"]) for case in measured)
    figure = Figure(figsize=(6 * len(subjects), 4.5), layout="constrained")
    for number, (subject, batch) in enumerate(subjects):
        axes = figure.add_subplot(1, len(subjects), number + 1)
        own = [case for case in measured if (case["subject"], case["batch"]) == (subject, batch)]
        (_draw_accuracy if own[0]["accuracy"] is not None else _draw_gains)(axes, own)
        budgets = ", ".join(str(budget) for budget in sorted({case["tokens"] for case in own[1:]}))
        axes.set_title(f"{subject}, batch of {batch}: {budgets} of {own[0]['of']} tokens", fontsize="medium")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return True


def _rows(cases: list[dict[str, Any]]) -> str:
    lines = [[heading for heading, _ in COLUMNS.values()], ["---"] * len(COLUMNS)]
    for case in cases:
        lines.append([_written(case, key, form) for key, (_, form) in COLUMNS.items()])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    refused = [case for case in cases if "refused" in case]
    return text + "".join(f"\n{case['method']} at {case['tokens']}: {case['refused']}\n" for case in refused)


def _written(case: dict[str, Any], key: str, form: str) -> str:
    if key == "method":
        return " ".join([case["method"], *case["options"]])
    value = case["cache_bytes"] / 2**20 if key == "cache_mib" and "cache_bytes" in case else case.get(key)
    return "" if value is None else format(value, form)


def _draw_accuracy(axes: Any, cases: list[dict[str, Any]]) -> None:
    """A line for each method, over its budgets."""
    plain, *others = cases
    axes.axhline(plain["accuracy"], color="grey", linewidth=0.8)
    axes.plot(plain["ttft_seconds"] * 1000, plain["accuracy"], "k*", label="no pruning")
    for method in dict.fromkeys(_name(case) for case in others):
        own = sorted((case for case in others if _name(case) == method), key=lambda case: case["tokens"])
        times = [case["ttft_seconds"] * 1000 for case in own]
        axes.plot(times, [case["accuracy"] for case in own], "o-", label=method)
    axes.set(xlabel="milliseconds to the first token", ylabel="accuracy")


def _draw_gains(axes: Any, cases: list[dict[str, Any]]) -> None:
    """A point for each method and budget, beside the line of what the arithmetic promises."""
    budgets = sorted({case["tokens"] for case in cases[1:]})
    for number, method in enumerate(dict.fromkeys(_name(case) for case in cases[1:])):
        own = [case for case in cases[1:] if _name(case) == method]
        for case in own:
            marker = MARKERS[budgets.index(case["tokens"]) % len(MARKERS)]
            label = method if case is own[0] else None
            axes.plot(case["flops_gain"], case["ttft_gain"], marker, color=f"C{number % 10}", label=label, alpha=0.8)
    most = max((case["flops_gain"] for case in cases), default=1.0)
    axes.plot([1, most], [1, most], "k-", linewidth=0.8, label="as fast as arithmetic promises")
    axes.plot([1, most], [0.8, 0.8 * most], "k:", linewidth=0.8, label="0.8 of it")
    axes.set(xlabel="times fewer FLOPs", ylabel="times faster to the first token")


def _name(case: dict[str, Any]) -> str:
    return " ".join([case["method"], *case["options"]])
