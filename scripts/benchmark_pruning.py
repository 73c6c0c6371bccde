"""Measure what pruning visual tokens is worth: time, arithmetic, memory and accuracy beside no pruning.

    python scripts/benchmark_pruning.py --out pruning.json
    python scripts/benchmark_pruning.py --out quick.json --quick          # a smoke test, its figures mean nothing
    python scripts/benchmark_pruning.py --out own.json --model runs/x/sft/final --rows runs/x/data/eval
    python scripts/benchmark_pruning.py --out some.json --methods 'visiondrop scoring=faithful' uniform --budgets 64

Without a model of one's own the models are of random weights, in the shape of LLaVA-1.5 (576 visual tokens) and of
LLaVA-NeXT (2880): those of 7B in bfloat16 on a GPU, elsewhere narrower ones (`pruning_benchmark/shapes.py`). Nothing
is scored on them. On a GPU they are measured with one prompt, and with the smallest batch that keeps it busy under the
first method. Methods take turns in every round; figures are medians over rounds.

FILE.json is a list of cases. A table (FILE.md) and a plot (FILE.png) are put beside it. Keys of a case:

    method, options, tokens, of    what was kept, on average over layers, of how many visual tokens
    ttft_gain         time to the first token without pruning / with. From pixel values to the token's id: with the
                      encoder, with deciding
    flops_gain        arithmetic of the same span, counted by torch's counter: without pruning / with. Attention counts
                      all pairs of tokens, as in the papers. `flops_gain_done` leaves out the half that kernels skip
                      under a causal mask; `flops_gain_planned` is foretold from `counts`, and knows of no deciding
    of_flops_gain     ttft_gain / flops_gain
    selection_share   time spent on deciding (reading queries and keys for it included) / the time from the language
                      model's first layer to the first token without pruning. `pruner_share` is all the pruner does
    accuracy          the mean over tasks; null without --model
    text_...          of the language model alone
    decode_tokens_per_second, end_to_end_gain, peak_mib, cache_bytes, ..._seconds, ttft_trials, tokens_per_layer,
    machine

Predicted before these shapes were measured, for VisionDrop on two cores: by hand, flops_gain is 4.3 at 64 of 576 and
6.4 at 320 of 2880 (published for 7B: 4.3 and 6.0), of the language model alone 5.1 and 8.5. ttft_gain is 0.92 and 0.90
of that: 4.0 and 5.8. What is lost is the encoder, whose narrow matrices run at a lower rate and which is a fifth and a
quarter of what is left, and causal attention, of which half was counted and never done. selection_share is 1 % and
0.6 %. Decoding is as fast as before within 5 %: it reads weights, not the cache. The cache is 5 and 8 times smaller.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from mllm.errors import user_errors
from mllm.pruning import PRUNERS
from pruning_benchmark import own_model, report
from pruning_benchmark.batches import smallest_busy_batch
from pruning_benchmark.cases import Candidate, measure
from pruning_benchmark.runs import time_answer
from pruning_benchmark.shapes import SHAPES, Subject, make_subject
from training_benchmark.process import machine

FIRST = ("visiondrop", "random", "uniform")
LIBRARIES = ("torch", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; a table and a plot go beside it")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="random models to measure")
    parser.add_argument("--methods", nargs="+", default=_in_order(), help="names, or names with options in one word")
    parser.add_argument("--budgets", nargs="+", type=int, default=[], help="tokens to keep; each shape has its own")
    parser.add_argument("--repeats", type=int, help="rounds; 5 by default")
    parser.add_argument("--new_tokens", type=int, help="of an answer; 16 by default")
    parser.add_argument(
        "--batch", type=int, help="prompts at once; by default 1, on a GPU also as many as are found to keep it busy"
    )
    parser.add_argument("--threads", type=int, help="one a core by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    own = parser.add_argument_group("a model of one's own")
    own.add_argument("--model", help="checkpoint directory, an adapter's too")
    own.add_argument("--rows", type=Path, help="directory with one JSONL file per task")
    own.add_argument("--tasks", nargs="+", help="which of these files to use; all by default")
    own.add_argument("--items", type=int, help="rows of each task to score; all by default")
    own.add_argument("--batch_size", type=int, default=64, help="questions answered at once when scoring")
    args = parser.parse_args()
    if (args.model is None) != (args.rows is None):
        parser.error("--model and --rows belong together")
    logging.disable_progress_bar()
    with user_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measure subject by subject; what is measured is written at once."""
    facts = machine(args.threads, libraries=LIBRARIES)
    torch.set_num_threads(facts["threads"])
    cases: list[dict[str, Any]] = []
    rounds = {"repeats": args.repeats or (2 if args.quick else 5), "new_tokens": args.new_tokens or 16}
    for take in subjects(args):
        subject, accuracy = take()
        for times in batches(args, subject):
            found = measure(subject, args.methods, times=times, accuracy=accuracy, say=say, **rounds)
            cases += [case | {"machine": facts, "quick": args.quick} for case in found]
            args.out.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    text = report.table(cases, facts)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    if not report.draw(cases, args.out.with_suffix(".png")):
        say("no plot: matplotlib is not installed")
    say(text)


def subjects(args: argparse.Namespace) -> list[Callable[[], tuple[Subject, Any]]]:
    """What makes each subject, with what scores it: one is in memory at a time."""
    device = torch.device(args.device)
    if args.model is None:
        size = "quick" if args.quick else "gpu" if device.type == "cuda" else "cpu"
        return [
            partial(lambda shape: (make_subject(shape, size, device, args.budgets), None), one) for one in args.shapes
        ]
    rows = own_model.read_rows(args.rows, tasks=args.tasks, items=args.items)
    return [partial(own_model.make_scored_subject, args.model, rows, args.batch_size, args.budgets, device)]


def batches(args: argparse.Namespace, subject: Subject) -> list[int]:
    """How often the prompts are repeated: once, and on a GPU so often that it is busy."""
    if args.batch is not None or args.device == "cpu" or args.model is not None:
        return [args.batch or 1]
    first = Candidate(args.methods[0], subject.budgets[-1])

    def seconds_of(batch: int) -> float | None:
        try:
            runs = [
                time_answer(subject.model, subject.repeated(batch), first.pruner(), new_tokens=1) for _ in range(3)
            ]
        except torch.OutOfMemoryError:
            return None
        return min(one["ttft"] for one in runs)

    return sorted({1, smallest_busy_batch(seconds_of)})


def say(text: str) -> None:
    """On the terminal, at once."""
    print(text, flush=True)


def _in_order() -> list[str]:
    return [*(name for name in FIRST if name in PRUNERS), *(name for name in PRUNERS if name not in FIRST)]


if __name__ == "__main__":
    main()
