"""Steps of preference training, ours and TRL's, compared."""

import shutil
import statistics
from pathlib import Path
from typing import Any

from mllm.data.order import every_row_once
from training_benchmark.checkpoints import TEMPLATE, make_checkpoint
from training_benchmark.pairs import make_pairs
from training_benchmark.process import Trial

SEED = 42
"""Of our side, by default; it decides the order of the rows, which TRL is given."""
TRL = "trl"
OURS = {
    "dpo": {"preset": "dpo", "precomputed": True},
    "rdpo": {"preset": "rdpo", "precomputed": True},
    "dpo_live": {"preset": "dpo", "precomputed": False},
    "rdpo_live": {"preset": "rdpo", "precomputed": False},
}
RATIOS = {name: f"{name}_ratio" if name.endswith("_live") else f"{name}_step_ratio" for name in OURS}
EPOCHS = (1, 3)
"""Over how many the pass is spread."""
BEGIN, BREAK, PROMPT = "{%- for message in messages -%}\n", "    {{- '\n' -}}\n", "{{- '<|im_start|>assistant\n' -}}"
TIGHT_TEMPLATE = (
    TEMPLATE.replace(BREAK, "")
    .replace(BEGIN, BEGIN + "    {%- if not loop.first -%}{{- '\n' -}}{%- endif -%}\n")
    .replace(PROMPT, "{{- '\n' -}}" + PROMPT)
)
"""ChatML with a line break in front of a message, not behind it: TRL scores all that follows the question."""


def compare_steps(plan: dict[str, Any], directory: Path, trial: Trial) -> dict[str, Any]:
    """Measure a step of each kind, in turn: what slows the machine down for a while slows down all of them."""
    spec = described(plan, directory)
    specs = {TRL: spec | {"side": "trl_preference"}}
    specs |= {name: spec | {"side": "our_preference"} | own for name, own in OURS.items()}
    trials: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
    for _ in range(plan["repeats"]):
        for name, one in specs.items():
            trials[name].append(trial(one))
    return summarized(plan, trials) | {"trials": trials}


def summarized(plan: dict[str, Any], trials: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The ratios, what they are of, and whether both sides score the same tokens."""
    seconds = {name: statistics.median(one["step_seconds"] for one in found) for name, found in trials.items()}
    found: dict[str, Any] = {key: seconds[name] / seconds[TRL] for name, key in RATIOS.items()}
    passes = {name: statistics.median(one["pass_seconds"] for one in trials[name]) for name in ("dpo", "rdpo")}
    for name, of_an_epoch in passes.items():
        for epochs in EPOCHS:
            spread = of_an_epoch / plan["steps"] / epochs
            found[f"{name}_ratio_with_pass_over_{epochs}"] = (seconds[name] + spread) / seconds[TRL]
    first = {name: {side: values[0] for side, values in of[0]["log_probs"].items()} for name, of in trials.items()}
    distances = [abs(first[name][side] - value) for name in OURS for side, value in first[TRL].items()]
    return found | {
        "first_log_probs_largest_difference": max(distances),
        "first_log_probs": first,
        "step_seconds": seconds,
        "spread": {name: _spread([one["step_seconds"] for one in of]) for name, of in trials.items()},
        "pass_seconds": passes,
        "batches": {name: _batches(of[0]["batches"]) for name, of in trials.items()},
        "peak_mib": {name: max(one["peak_mib"] for one in of) for name, of in trials.items()},
        "cuda_peak_mib": {name: of[0]["cuda_peak_mib"] for name, of in trials.items()},
    }


def described(plan: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What all trials have in common; pairs and model are made if they are not there."""
    num_pairs = plan["steps"] * plan["pairs_of_a_step"]
    rows = make_pairs(directory / f"pairs-{num_pairs}", num_pairs)
    model = make_checkpoint(directory / "models", plan["shape"], rows.with_name("conversations.jsonl"))
    return {
        "model": str(with_template(model)),
        "rows": str(rows),
        "num_rows": num_pairs,
        "order": every_row_once(num_pairs)(0, SEED).tolist(),
        "pairs_of_a_step": plan["pairs_of_a_step"],
        "learning_rate": 1e-5,
        "beta": 0.1,
        "bf16": plan["bf16"],
    }


def with_template(model: Path) -> Path:
    """The model with a template that ends with an answer's last token."""
    path = model.with_name(f"{model.name}-tight")
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(model, partial)
        (partial / "chat_template.jinja").write_text(TIGHT_TEMPLATE, encoding="utf-8")
        partial.rename(path)
    return path


def _spread(values: list[float]) -> float:
    """Largest over smallest."""
    return max(values) / min(values)


def _batches(seen: dict[str, list[int]]) -> dict[str, float]:
    """Means of the steps."""
    return {name: statistics.mean(values) for name, values in seen.items()}
