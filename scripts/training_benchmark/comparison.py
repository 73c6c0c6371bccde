"""The two sides, compared: trials are described here, run by what `runner` gives, and set against each other."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training_benchmark.checkpoints import make_checkpoint
from training_benchmark.mixture import SCALED, make_mixture, part_of
from training_benchmark.process import Trial

LEARNING_RATE = 1e-3
OURS, TRL, GROUPED = "our", "trl", "trl_grouped"
CHOSEN = ("side", "batching", "pack_length", "batch_rows", "workers", "sampling")
"""What a trial is told of how to train, as against what on."""


def compare_tokens(plan: dict[str, Any], directory: Path, trial: Trial) -> dict[str, Any]:
    """What the rows are, and how many of them both sides encode to the same ids and the same labels."""
    alone = {"side": "tokens", "batching": "random", "batch_rows": 1, "workers": 0}
    found = trial(described(plan, directory) | alone)["tokens"]
    if not found["rows"] == found["rows_of_trl"] == found["rows_with_equal_labels"]:
        print(f"THE SIDES LEARN DIFFERENT TOKENS: {found}")
    return found


def compare_speed(plan: dict[str, Any], directory: Path, trial: Trial, tokens: dict[str, Any]) -> dict[str, Any]:
    """Tune both sides over a part of the rows, then measure the best of each over all rows, in turn."""
    part = described(plan, directory, places=range(plan["sweep_rows"]), tokens=tokens)
    sizes = {TRL: trl_choices(plan["trl_batches"]), OURS: our_choices(plan), GROUPED: grouped_choices(plan["grouped"])}
    swept = {name: sweep(part, choices, plan["workers"], trial) for name, choices in sizes.items() if choices}
    choices = {name: best_choice(trials) for name, trials in swept.items()}
    whole = described(plan, directory, tokens=tokens)
    finals: dict[str, list[dict[str, Any]]] = {name: [] for name in choices}
    for _ in range(plan["repeats"]):  # in turn: what slows the machine down for a while slows down all of them
        for name, choice in choices.items():
            finals[name].append(trial(whole | choice))
    speeds = {name: statistics.median(one["rows_per_second"] for one in trials) for name, trials in finals.items()}
    return {
        "rows_per_second_ratio": speeds[OURS] / speeds[TRL],
        "rows_per_second_ratio_grouped": speeds[OURS] / speeds[GROUPED] if GROUPED in speeds else None,
        "rows_per_second": speeds,
        "best": choices,
        "trials": {"sweep": swept, "final": finals},
    }


def sweep(
    part: dict[str, Any], choices: list[dict[str, Any]], workers: Sequence[int], trial: Trial
) -> list[dict[str, Any]]:
    """Trials of one side: every size of a micro-batch without workers, then the best size with workers."""
    without, *others = workers
    if len(choices) == 1 and not others:
        return [choices[0] | {"workers": without, "rows_per_second": 0.0}]  # nothing to choose
    found = [trial(part | choice | {"workers": without, "may_fail": True}) for choice in choices]
    best = best_choice(found)
    return found + [trial(part | best | {"workers": number, "may_fail": True}) for number in others]


def compare_losses(plan: dict[str, Any], directory: Path, trial: Trial, figures: dict[str, Any]) -> dict[str, Any]:
    """Losses step by step on a smaller model: the same rows in the same steps on both sides, and ours in packs.

    TRL is given the rows of all epochs in the order that our `batching: random` has them in.
    """
    tokens = figures["tokens"]
    order = [place for epoch in tokens["orders"][: plan["curve_epochs"]] for place in epoch]
    spec = described(plan, directory, shape=plan["curve_shape"], tokens=tokens) | {"workers": 0}
    epochs = {"epochs": plan["curve_epochs"], "side": OURS}
    trials = {
        "TRL": spec | {"side": TRL, "batch_rows": 2, "sampling": "sequential", "order": order},
        "ours, same steps": spec | epochs | {"batching": "random", "batch_rows": 2},
        "ours, packed": spec | epochs | {"batching": "packed", "pack_length": plan["packs"][0]},
    }
    losses = {name: trial(one)["losses"] for name, one in trials.items()}
    pairs = zip(losses["TRL"], losses["ours, same steps"], strict=True)
    ends = {name: statistics.mean(curve[-max(1, len(curve) // 4) :]) for name, curve in losses.items()}
    return {
        "loss_curves": losses,
        "loss_curves_largest_difference": max(abs(one - other) for one, other in pairs),
        "loss_curves_last_quarter": ends,
    }


def find_shares(plan: dict[str, Any], directory: Path, trial: Trial, figures: dict[str, Any]) -> dict[str, Any]:
    """Shares of each side's time at its best, without workers, by model: also with a head that is a smaller part."""
    part = described(plan, directory, places=range(plan["sweep_rows"]), tokens=figures["tokens"])
    found: dict[str, Any] = {"shares": {}}
    for shape in plan["share_shapes"]:
        model = described(plan, directory, shape=shape)["model"]
        changes = {"workers": 0, "shares": True, "model": model}
        sides = {side: trial(part | figures["best"][side] | changes) for side in (TRL, OURS)}
        found["shares"][shape] = {side: one["shares"] for side, one in sides.items()}
        if shape != plan["shape"]:
            speeds = {side: one["rows_per_second"] for side, one in sides.items()}
            found[f"rows_per_second_ratio_{shape}"] = speeds[OURS] / speeds[TRL]
    return found


def compare_memory(plan: dict[str, Any], directory: Path, trial: Trial, figures: dict[str, Any]) -> dict[str, Any]:
    """Peaks of both sides at several micro-batch sizes, and at the one where each is fastest; no workers.

    The rows have the published lengths. They are few, from the shortest to the longest, as a peak is that of the
    largest micro-batch, and there are two epochs, as AdamW's moments come with the first step.
    """
    plan, tokens = plan | {"shape": plan["memory_shape"]}, figures["tokens"]
    if plan["memory_pool"] is not None:
        plan |= {"rows": plan["memory_pool"], "scale": 1 / SCALED}
        directory = directory / "memory"
        tokens = compare_tokens(plan, directory, trial)
    places = spread_places(tokens["row_lengths"], plan["memory_rows"])
    spec = described(plan, directory, places=places, tokens=tokens)
    spec |= {"workers": 0, "may_fail": True, "epochs": 2, "step_rows": plan["memory_rows"]}
    longest = max(tokens["row_lengths"][place] for place in places)  # of our packs as of TRL's batches of one row
    packed = {"side": OURS, "batching": "packed", "pack_length": longest}
    choices = [*trl_choices(plan["memory_batches"]), packed]
    found: dict[str, Any] = {"memory": {"lengths": tokens["lengths"]}}
    for mode in plan["modes"]:
        trials = [trial(spec | choice | {"mode": mode}) for choice in choices]
        fastest = {side: fastest_of([one for one in trials if one["side"] == side]) for side in (TRL, OURS)}
        ratio = fastest[OURS]["peak_mib"] / fastest[TRL]["peak_mib"]
        found["memory"][mode] = {"ratio": ratio, "fastest": fastest, "trials": trials}
        found["peak_memory_ratio" if mode == "full" else f"peak_memory_ratio_{mode}"] = ratio
    return found


def spread_places(lengths: list[int], count: int) -> list[int]:
    """Places of so many rows, evenly spread from the shortest to the longest, in the order of the file."""
    ranked = sorted(range(len(lengths)), key=lengths.__getitem__)
    steps = max(1, count - 1)
    return sorted(ranked[number * (len(ranked) - 1) // steps] for number in range(count))


def described(
    plan: dict[str, Any],
    directory: Path,
    *,
    places: Sequence[int] | None = None,
    shape: str | None = None,
    tokens: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What all trials on these rows have in common; rows and model are made if they are not there.

    Args:
        plan: Sizes of everything.
        directory: Where rows and models are.
        places: Of the rows in their file; all by default.
        shape: Of the model; the plan's by default.
        tokens: What `compare_tokens` found, where it is known.
    """
    rows = make_mixture(directory / "mixture", plan["rows"], scale=plan.get("scale", 1.0))
    model = make_checkpoint(directory / "models", shape or plan["shape"], rows)
    places = range(plan["rows"]) if places is None else places
    spec = {
        "model": str(model),
        "rows": str(part_of(rows, places)),
        "num_rows": len(places),
        "step_rows": plan["step_rows"],
        "learning_rate": LEARNING_RATE,
        "bf16": plan["shape"] == "gpu",
    }
    if tokens is None:
        return spec
    lengths = [tokens["row_lengths"][place] for place in places]
    return spec | {"mean_tokens": statistics.mean(lengths), "lengths": lengths}


def trl_choices(batches: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of a micro-batch."""
    return [{"side": TRL, "batch_rows": rows} for rows in batches]


def grouped_choices(batches: Sequence[int]) -> list[dict[str, Any]]:
    """TRL with transformers' grouping by length, which needs lengths that TRL itself does not find out."""
    return [choice | {"sampling": "group_by_length"} for choice in trl_choices(batches)]


def our_choices(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Packs of so many tokens, and batches of so many rows of like length."""
    choices: list[dict[str, Any]] = [{"batching": "packed", "pack_length": tokens} for tokens in plan["packs"]]
    choices += [{"batching": "length", "batch_rows": rows} for rows in plan["lengths"]]
    return [{"side": OURS, **choice} for choice in choices]


def best_choice(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """What the fastest of these trials was told."""
    best = fastest_of(trials)
    return {name: best[name] for name in CHOSEN if name in best}


def fastest_of(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the most rows a second.

    Raises:
        RuntimeError: None came to its end.
    """
    done = [one for one in trials if "error" not in one]
    if not done:
        raise RuntimeError(f"no trial came to its end; the last one:\n{trials[-1]['error']}")
    return max(done, key=lambda one: one["rows_per_second"])
