"""How a preference run went, as a picture of what its log says. matplotlib is imported when it is drawn."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm.training.callbacks import LOG

PICTURE = "preference.png"

PANELS = {
    "loss, and what each term adds to it": ("loss", "loss_terms/"),
    "rewards: beta times the log-ratio to the reference": ("rewards/",),
    "margins: chosen over rejected, the picture over its contrast": ("margins/",),
    "accuracies: pairs that are the right way round": ("accuracies/",),
    "log-probabilities of the answers": ("log_probs/",),
    "kl: how far from the reference, by the token": ("kl",),
}
"""Of each panel its title, and the figures it shows: a name, or what names begin with."""

COLOURS = {
    "chosen": "#2e8b57", "rejected": "#c8503c", "contrast": "#4a86c8", "text": "#c8503c", "visual": "#4a86c8",
    "anchor": "#2e8b57", "sigmoid": "#c8503c", "loss": "#505860", "kl": "#505860",
}  # fmt: skip
"""The comparison with a side has the side's colour."""

OTHER_COLOURS = ("#a05ab4", "#e0a030", "#50a0a0", "#8c8c3c", "#785a50")
"""Of what has none of its own, in turn."""

VALIDATION = "eval/"
"""The names of figures of validation begin with it."""

Curve = dict[int, float]
"""A figure by the step after which it was logged."""


def draw_preference(output_dir: str | Path) -> bool:
    """Draw `OUTPUT_DIR/preference.png` from `log.jsonl`, dots for validation; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    log = Path(output_dir, LOG)
    curves = read_curves(log.read_text(encoding="utf-8").splitlines() if log.is_file() else [])
    figure = Figure(figsize=(12, 10), layout="constrained")
    for axes, (title, shown) in zip(figure.subplots(3, 2).flat, PANELS.items(), strict=True):
        axes.set_prop_cycle(color=OTHER_COLOURS)
        for name, label, is_validation in _shown(curves, shown):
            style = {"color": COLOURS[label]} if label in COLOURS else {}
            if is_validation:
                style |= {"linestyle": "none", "marker": "o", "label": f"{label}, validation"}
            axes.plot(curves[name].keys(), curves[name].values(), **({"marker": ".", "label": label} | style))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(Path(output_dir, PICTURE), dpi=100)
    return True


def read_curves(lines: Iterable[str]) -> dict[str, Curve]:
    """The figures of a log by name. What is no number is a gap, and half a line of a killed run is left out."""
    curves: dict[str, Curve] = {}
    for line in map(_figures, lines):
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                curves.setdefault(name, {})[line["step"]] = value if math.isfinite(value) else math.nan
    return curves


def _figures(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _shown(curves: Mapping[str, Curve], shown: tuple[str, ...]) -> Iterator[tuple[str, str, bool]]:
    """Of the curves of a panel their names, their labels, and whether they are of validation."""
    for name in curves:
        plain = name.removeprefix(VALIDATION)
        if any(plain == one or (one.endswith("/") and plain.startswith(one)) for one in shown):
            yield name, plain.rpartition("/")[2], plain != name
