"""Score a model on the digits world's evaluation rows, beside what can be had without looking.

    python scripts/evaluate_model.py runs/quickstart/run/sft/final --rows runs/quickstart/data/eval --out eval.json

For every task it writes the model's metrics; beside them, metric by metric, the better of its own with blank media
(grey pictures and frames, silence) and of the best constant answer; of captions and of questions about presence also
what the model named that is not there; and the answers themselves. With --pruner it answers again from fewer visual
tokens, as often as the option is given:

    ... --pruner visiondrop tokens=3 --pruner random tokens=3
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
from mllm.evaluation.pruning_picture import draw_answers
from mllm.evaluation.pruning_report import accuracy, format_table, pruned_case, without_budget
from mllm.evaluation.runner import answer_rows, read_evaluation_rows
from mllm.load import merged
from mllm.pruning import build_pruner


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Score a model on the digits world.",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="checkpoint directory, an adapter's too")
    parser.add_argument("--rows", type=Path, nargs="+", required=True, help="directories with one JSONL file per task")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--batch_size", type=int, default=128, help="questions answered at once")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="which files of --rows to use")
    parser.add_argument("--items", type=int, help="only so many rows of each task, from the first on")
    parser.add_argument(
        "--no_blank", action="store_true", help="skip the answers to blank media; the baseline is the best constant"
    )
    parser.add_argument(
        "--pruner", nargs="+", action="append", default=[], metavar=("METHOD", "OPTION=VALUE"),
        help="answer again from fewer visual tokens: visiondrop tokens=3",
    )  # fmt: skip
    parser.add_argument(
        "--picture", type=Path, help="PNG of what each method, as asked for last, leaves of the first row"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with user_errors():
        report = evaluate(args)
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for task, found in report["tasks"].items():
        print(task, json.dumps({key: found[key] for key in ("model", "baseline", "hallucination") if found[key]}))
    if report["pruned"]:
        print(format_table(report["pruned"], unpruned=report["accuracy"]))


def evaluate(args: argparse.Namespace) -> dict:
    """Answer every row, with its media, with blank ones and from fewer tokens, and score the answers."""
    pruners = {spec: build_pruner(spec) for spec in map(" ".join, args.pruner)}
    files = {task: _file_of(task, args.rows) for task in args.tasks}
    logging.disable_progress_bar()
    processor, model = load_processor(args.model), merged(load_model(args.model, device=args.device)).eval()
    rows = {task: read_evaluation_rows(file)[: args.items] for task, file in files.items()}
    rounds, start = 1 + (not args.no_blank) + len(pruners), time.perf_counter()
    with tqdm(total=rounds * sum(map(len, rows.values())), desc="questions", unit="row") as bar:

        def answered(**how) -> dict[str, list[str]]:
            how |= {"batch_size": args.batch_size, "progress": bar.update}
            return {task: answer_rows(model, processor, of_task, **how) for task, of_task in rows.items()}

        answers = answered()
        blanks = {} if args.no_blank else answered(blank=True)
        tasks = {task: task_report(task, answers[task], blanks.get(task), of_task) for task, of_task in rows.items()}
        whole = {task: found["model"] for task, found in tasks.items()}
        pruned = []
        for spec, pruner in pruners.items():
            scores = {task: score(task, said, rows[task]) for task, said in answered(pruner=pruner).items()}
            pruned.append(pruned_case(spec, pruner, scores, whole=whole))
    if args.picture and pruners:
        last = {without_budget(spec): spec for spec in pruners}
        first = next(iter(rows.values()))[0]
        draw_answers(model, processor, first, {spec: pruners[spec] for spec in last.values()}).save(args.picture)
    return {
        "tasks": tasks,
        "accuracy": accuracy(whole),
        "pruned": pruned,
        "seconds": round(time.perf_counter() - start, 1),
        "model": args.model,
    }


def task_report(task: str, answers: list[str], blanks: list[str] | None, rows: list[dict]) -> dict:
    """What one task's answers are worth, beside what needs no looking."""
    constant = best_constant(task, rows)
    blank = constant if blanks is None else score(task, blanks, rows)
    return {
        "model": score(task, answers, rows),
        "baseline": {name: max(blank[name], constant[name]) for name in constant},
        "hallucination": hallucination(task, answers, rows),
        "items": len(rows),
        "answers": {row["id"]: answer for row, answer in zip(rows, answers, strict=True)},
    }


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


if __name__ == "__main__":
    main()
