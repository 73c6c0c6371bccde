"""A model and an evaluation of one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mllm import load_model, load_processor
from mllm.errors import OptionError
from mllm.evaluation.digits import TASKS_OF, score
from mllm.evaluation.pruning_report import accuracy as mean_accuracy
from mllm.evaluation.runner import answer_rows, question_of, read_evaluation_rows
from mllm.inference.prompt import encode_prompt, model_inputs
from mllm.load import merged
from mllm.processing import TrainingProcessor
from mllm.pruning import Pruner
from pruning_benchmark.cases import Accuracy
from pruning_benchmark.runs import lengths_of_rows
from pruning_benchmark.shapes import Subject

SHARES = (0.11, 0.22, 0.33)
"""Of a picture's tokens: the budgets where none are given."""
Rows = dict[str, list[dict[str, Any]]]


def read_rows(directory: Path, *, tasks: Sequence[str] | None, items: int | None) -> Rows:
    """The first rows of each task's file.

    Raises:
        OptionError: There is no file of any of these tasks.
    """
    wanted = tasks or [*TASKS_OF["image"], *TASKS_OF["video"]]
    files = {task: directory / f"{task}.jsonl" for task in wanted}
    rows = {task: read_evaluation_rows(file)[:items] for task, file in files.items() if file.is_file()}
    if not rows:
        raise OptionError(
            f"--rows {directory}: none of {', '.join(file.name for file in files.values())}",
            expected="a JSONL file for each task, as the recipes data_recipes/digits*.py write them",
            do="name a recipe's `eval` directory",
        )
    return rows


def make_scored_subject(
    path: str, rows: Rows, batch_size: int, budgets: Sequence[int], device: torch.device
) -> tuple[Subject, Accuracy]:
    """The model, with a batch of prompts whose time is taken and what scores it.

    Args:
        path: Of the checkpoint, an adapter's too.
        rows: To be asked about; those whose time is taken are of all tasks.
        batch_size: Questions answered at once.
        budgets: Empty for `SHARES`.
        device: Where it runs.
    """
    processor, model = load_processor(path), merged(load_model(path, device=device)).eval()
    turns = max(map(len, rows.values()))
    mixed = [of_task[turn] for turn in range(turns) for of_task in rows.values() if turn < len(of_task)]
    prompts = [encode_prompt(processor, question_of(row)) for row in mixed[:batch_size]]
    inputs = model_inputs(processor, prompts, device=device)
    of = max(length for items, _ in lengths_of_rows(model, inputs) for length in items)
    subject = Subject(path, model, inputs, of, tuple(budgets) or _budgets(of))
    return subject, _accuracy_on(model, processor, rows, batch_size=batch_size)


def _accuracy_on(model: PreTrainedModel, processor: TrainingProcessor, rows: Rows, *, batch_size: int) -> Accuracy:
    """Scores a pruner on these rows."""

    def accuracy(pruner: Pruner | None) -> dict[str, Any]:
        answers = {
            task: answer_rows(model, processor, own, pruner=pruner, batch_size=batch_size)
            for task, own in rows.items()
        }
        by_task = {task: score(task, answers[task], rows[task]) for task in rows}
        return {"accuracy": mean_accuracy(by_task), "metrics": by_task}

    return accuracy


def _budgets(of: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(share * of)) for share in SHARES}, reverse=True))
