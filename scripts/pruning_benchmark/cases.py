"""All methods and budgets on one subject, in turn, beside no pruning."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm.errors import OptionError
from mllm.pruning import Pruner, build_pruner
from mllm.pruning.flops import planned_tokens, prefill_flops, text_sizes
from pruning_benchmark.runs import count_prompt, lengths_of_rows, time_answer, time_decisions
from pruning_benchmark.shapes import Subject

NONE = "none"
Accuracy = Callable[[Pruner | None], dict[str, float]]
"""Of a model under a pruner: "accuracy", and what it is the mean of."""


@dataclass
class Candidate:
    """A method with its budget.

    Args:
        spec: The method as programs are told of it, without its budget; `NONE` for no pruning.
        tokens: The budget.
        counted: From `count_prompt`.
        trials: Of each round, from `time_answer`.
        decisions: Of each, from `time_decisions`.
        refused: Why the model, or the budget, is not for this method.
    """

    spec: str
    tokens: int
    counted: dict[str, Any] = field(default_factory=dict)
    trials: list[dict[str, float]] = field(default_factory=list)
    decisions: list[dict[str, float]] = field(default_factory=list)
    refused: str | None = None

    def pruner(self) -> Pruner | None:
        """A new one each time: it shall remember nothing."""
        return None if self.spec == NONE else build_pruner(f"{self.spec} tokens={self.tokens}")

    def median(self, name: str) -> float:
        """Of a figure over the rounds."""
        return statistics.median(trial[name] for trial in self.trials)


def measure(
    subject: Subject,
    specs: Sequence[str],
    *,
    times: int = 1,
    repeats: int,
    new_tokens: int,
    accuracy: Accuracy | None = None,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """The cases of a subject; the first one is without pruning.

    Every round runs each candidate once, so that a machine that becomes slower does so for all of them. A first round
    counts arithmetic and warms up.

    Args:
        subject: Is measured.
        specs: Methods, as programs are told of them, without their budgets.
        times: How often the subject's prompts are repeated in the batch.
        repeats: Rounds.
        new_tokens: Of an answer.
        accuracy: Scores a pruner.
        say: Told of progress.
    """
    inputs = subject.repeated(times)
    rows = lengths_of_rows(subject.model, subject.inputs)
    candidates = [Candidate(NONE, subject.of)]
    candidates += [Candidate(spec, budget) for budget in subject.budgets for spec in specs]
    for one in candidates:
        _count(one, subject, inputs, rows)
    running = [one for one in candidates if one.refused is None]
    for number in range(repeats):
        for one in running:
            one.trials.append(time_answer(subject.model, inputs, one.pruner(), new_tokens=new_tokens))
        said = ", ".join(f"{one.spec}@{one.tokens} {one.trials[-1]['ttft']:.3g}" for one in running)
        say(f"{subject.name}, round {number + 1} of {repeats}: seconds to the first token: {said}")
    for one in running[1:]:
        pruners = (one.pruner() for _ in range(min(repeats, 3)))
        one.decisions = [time_decisions(subject.model, inputs, pruner) for pruner in pruners if pruner is not None]
    batch = len(inputs["input_ids"])
    found = [case_of(one, candidates[0], subject, batch) for one in candidates]
    for one, case in zip(candidates, found, strict=True):
        if accuracy is not None and one.refused is None:
            case |= accuracy(one.pruner())
            say(f"{subject.name}: {one.spec}@{one.tokens} accuracy {case['accuracy']:.3f}")
    return found


def case_of(one: Candidate, plain: Candidate, subject: Subject, batch: int) -> dict[str, Any]:
    """The figures of a candidate, beside those of the one without pruning."""
    method, *options = one.spec.split()
    said = {
        "subject": subject.name,
        "method": method,
        "options": options,
        "tokens": one.tokens,
        "of": subject.of,
        "batch": batch,
    }
    if one.refused is not None:
        missing = dict.fromkeys(("ttft_gain", "flops_gain", "selection_share", "accuracy"))
        return said | missing | {"refused": one.refused}
    counted, reference = one.counted, plain.counted
    vision = reference["flops"] - reference["text_flops"]
    gains = {
        "ttft_gain": plain.median("ttft") / one.median("ttft"),
        "flops_gain": reference["flops"] / counted["flops"],
        "selection_share": _share(one, plain, "deciding"),
        "accuracy": None,
        "flops_gain_done": reference["flops_done"] / counted["flops_done"],
        "flops_gain_planned": (vision + reference["text_flops_planned"]) / (vision + counted["text_flops_planned"]),
        "pruner_share": _share(one, plain, "pruner_work"),
        "text_ttft_gain": plain.median("prefill") / one.median("prefill"),
        "text_flops_gain": reference["text_flops"] / counted["text_flops"],
        "end_to_end_gain": plain.median("end_to_end") / one.median("end_to_end"),
    }
    gains["of_flops_gain"] = gains["ttft_gain"] / gains["flops_gain"]
    seconds = {f"{name}_seconds": one.median(name) for name in ("ttft", "prefill", "end_to_end", "decode")}
    rate = batch / one.median("decode") if one.median("decode") else None
    return (
        said | gains | seconds
        | {"decode_tokens_per_second": rate, "peak_mib": one.median("peak_mib")}
        | counted
        | {"ttft_trials": [trial["ttft"] for trial in one.trials]}
    )  # fmt: skip


def _count(one: Candidate, subject: Subject, inputs: dict[str, Any], rows: list[tuple[list[int], int]]) -> None:
    """Count a prompt's arithmetic, and foretell it from the lengths of its rows."""
    try:
        pruner = one.pruner()
        one.counted = count_prompt(subject.model, inputs, pruner)
    except OptionError as error:
        one.refused = f"{error.found}; expected: {error.expected}"
        return
    sizes = text_sizes(subject.model)
    planned = [
        prefill_flops(sizes, planned_tokens(pruner, items=items, num_text=text, num_layers=len(sizes.layer_weights)))
        for items, text in rows
    ]
    one.counted["text_flops_planned"] = statistics.mean(planned)


def _share(one: Candidate, plain: Candidate, name: str) -> float:
    """Of the unpruned language model's prefill: what the pruner's decisions or work take."""
    if not one.decisions:
        return 0.0
    return statistics.median(trial[name] for trial in one.decisions) / plain.median("prefill")
