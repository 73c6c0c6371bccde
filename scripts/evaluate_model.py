"""Score a model on the digits world's evaluation rows, beside what can be had without looking.

    python scripts/evaluate_model.py runs/quickstart/run/sft/final --rows runs/quickstart/data/eval --out eval.json

For every task it writes the model's metrics; beside them, metric by metric, the better of its own with blank media
(grey pictures and frames, silence) and of the best constant answer; of captions and of questions about presence also
what the model named that is not there; and the answers themselves.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from mllm import load_model, load_processor
from mllm.errors import OptionError, user_errors
from mllm.evaluation.digits import TASKS, best_constant, score
from mllm.evaluation.hallucination import hallucination
from mllm.evaluation.runner import answer_rows, read_evaluation_rows
from mllm.load import merged


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a model on the digits world.", epilog=__doc__)
    parser.add_argument("model", help="checkpoint directory, an adapter's too")
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="directories with one JSONL file per task")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch_size", type=int, default=128, help="questions answered at once")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="which files of --rows to use")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with user_errors():
        report = evaluate(args)
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for task, found in report["tasks"].items():
        print(task, json.dumps({key: found[key] for key in ("model", "baseline", "hallucination") if found[key]}))


def evaluate(args: argparse.Namespace) -> dict:
    """Answer every row twice, with and without its media, and score both."""
    files = {task: _file_of(task, args.rows) for task in args.tasks}
    logging.disable_progress_bar()
    processor, model = load_processor(args.model), merged(load_model(args.model, device=args.device)).eval()
    rows = {task: read_evaluation_rows(file) for task, file in files.items()}
    report, start = {}, time.perf_counter()
    with tqdm(total=2 * sum(map(len, rows.values())), desc="questions", unit="row") as bar:
        for task, of_task in rows.items():
            answers, blanks = (
                answer_rows(model, processor, of_task, blank=blank, batch_size=args.batch_size, progress=bar.update)
                for blank in (False, True)
            )
            report[task] = {
                "model": score(task, answers, of_task),
                "baseline": _better(score(task, blanks, of_task), best_constant(task, of_task)),
                "hallucination": hallucination(task, answers, of_task),
                "items": len(of_task),
                "answers": {row["id"]: answer for row, answer in zip(of_task, answers, strict=True)},
            }
    return {"tasks": report, "seconds": round(time.perf_counter() - start, 1), "model": args.model}


def _file_of(task: str, directories: list[Path]) -> Path:
    """The task's rows, in the first directory that has them.

    Raises:
        OptionError: None has.
    """
    if found := [path for directory in directories if (path := directory / f"{task}.jsonl").is_file()]:
        return found[0]
    raise OptionError(
        f"--rows {' '.join(map(str, directories))}: no {task}.jsonl",
        expected="a JSONL file for each of --tasks, as the recipes data_recipes/digits*.py write them",
        do="name the recipes' `eval` directories, or other tasks",
    )


def _better(blank: dict[str, float], constant: dict[str, float]) -> dict[str, float]:
    """Metric by metric the better of the two baselines."""
    return {name: max(blank[name], constant[name]) for name in blank}


if __name__ == "__main__":
    main()
