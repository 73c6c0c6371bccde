"""Does Re-Align make a model say less of what is not there? The digits world answers, over several seeds.

    python scripts/digits_preference.py runs/quickstart-seed0 runs/quickstart-seed1 runs/quickstart-seed2 \
        --out runs/digits-preference

From each finished quickstart (`make quickstart-seeds`) it takes the pictures and the aligned model, fine-tunes that
too briefly, so that it errs, and builds Re-Align's pairs on training pictures with it: the better answer is the true
caption, the worse one what the model writes into it while it looks at another picture. Then it trains on the pairs
with each method for the same number of steps, and evaluates before and after on unseen handwriting. Three columns
are controls: `sft`, the same steps on the better answers alone, without any preference; `mdpo_unanchored` and
`rdpo_anchored`, which tell the anchor's effect from that of the other picture.

Every step is an ordinary program in a process of its own; done steps are skipped, so the same command goes on. At the
end stand OUT/table.md and OUT/report.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from mllm.checkpoints import is_complete
from mllm.errors import CheckpointError, MllmError, user_errors
from mllm.evaluation.digits import TASKS
from mllm.evaluation.preference_report import BEFORE, format_table, read_scores, summarize

ROOT = Path(__file__).resolve().parent.parent
PLAN = "train/configs/digits_preference.yaml"
METHODS = {
    "sft": ["stages.prefer.preset=dpo", "stages.prefer.loss_type=sft"],
    "dpo": ["stages.prefer.preset=dpo"],
    "mdpo": ["stages.prefer.preset=mdpo"],
    "rdpo": ["stages.prefer.preset=rdpo"],
    "mdpo_unanchored": ["stages.prefer.preset=mdpo", "stages.prefer.anchor_weight=0"],
    "rdpo_anchored": ["stages.prefer.preset=rdpo", "stages.prefer.anchor_weight=1"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstarts", type=Path, nargs="+", help="directories of finished quickstarts, a seed each")
    parser.add_argument("--out", type=Path, required=True, help="directory for everything it makes")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sft_steps", type=int, default=40, help="of the brief fine-tuning; a quickstart has 1150")
    parser.add_argument("--scenes", type=int, default=640, help="training pictures to make pairs of")
    parser.add_argument("--tau", type=float, default=0.95, help="worse answers are less alike to the better ones")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="what is evaluated before and after")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY.PATH=VALUE", help=f"change {PLAN}, as run.py does"
    )
    args = parser.parse_args()
    with user_errors():
        seeds = {seed_of(quickstart): quickstart for quickstart in args.quickstarts}
        report = summarize({seed: experiment(seed, quickstart, args) for seed, quickstart in seeds.items()})
        (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (args.out / "table.md").write_text(format_table(report) + "\n", encoding="utf-8")
    print(f"\n{format_table(report)}\n\ntable: {args.out / 'table.md'}    report: {args.out / 'report.json'}")


def seed_of(quickstart: Path) -> int:
    """The seed of a quickstart.

    Raises:
        CheckpointError: There is none, or it is not finished.
    """
    steps = quickstart / "steps.json"
    if not (steps.is_file() and is_complete(quickstart / "run" / "align" / "final")):
        raise CheckpointError(
            f"{quickstart} holds no trained quickstart", expected="its directory", do="make quickstart-seeds"
        )
    return json.loads(steps.read_text(encoding="utf-8"))["seed"]


def experiment(seed: int, quickstart: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All steps of one seed that are not done yet; returns the scores of each model."""
    out = args.out.resolve() / f"seed{seed}"
    out.mkdir(parents=True, exist_ok=True)
    for name, (product, line) in steps(seed, quickstart.resolve(), out, args).items():
        if product.exists():
            continue
        print(f"\n=== seed {seed}, {name}\n    {' '.join(line)}", flush=True)
        start = time.perf_counter()
        if status := subprocess.run(line, cwd=ROOT).returncode:
            raise MllmError(
                f"a step ended with status {status}",
                expected="status 0",
                do="read what it said above; the same command goes on from this step",
            )
        print(f"    {time.perf_counter() - start:.0f} s", flush=True)
    return {name: read_scores(out / f"{name}.json") for name in (BEFORE, *args.methods)}


def steps(seed: int, quickstart: Path, out: Path, args: argparse.Namespace) -> dict[str, tuple[Path, list[str]]]:
    """Of each step what it makes, and its command line."""
    model, pairs, rows = out / "brief" / "final", out / "pairs", quickstart / "data" / "eval"
    found: dict[str, tuple[Path, list]] = {
        "brief sft": (
            model,
            ["train/sft.py", "--config", "train/configs/quickstart.yaml", "--stage", "sft", "--seed", seed]
            + ["--model", quickstart / "run" / "align" / "final", "--data_root", quickstart / "data"]
            + ["--output_dir", out / "brief", "--max_steps", args.sft_steps]
            + ["--feature_cache", quickstart / "run" / "features"],
        ),
        "pairs": (
            pairs / "recipe.json",
            ["data_recipes/re_align.py", "construct", "--rows", quickstart / "data" / "caption.jsonl"]
            + ["--take", f"first:{args.scenes}", "--model", model, "--out", pairs, "--tau", args.tau],
        ),
    }
    for name in args.methods:
        found[name] = (
            out / name / "prefer" / "final",
            ["train/run.py", PLAN, "--output_dir", out / name, "--set", f"model={model}", f"seed={seed}"]
            + [f"stages.prefer.data={{mixture: {pairs / 'mixture.yaml'}}}", *METHODS[name], *args.set],
        )
    for name in (BEFORE, *args.methods):
        scored = model if name == BEFORE else out / name / "prefer" / "final"
        found[f"scores of {name}"] = (
            out / f"{name}.json",
            ["scripts/evaluate_model.py", scored, "--rows", rows, "--out", out / f"{name}.json", "--no_blank"]
            + ["--tasks", *args.tasks],
        )
    return {name: (product, [sys.executable, *map(str, line)]) for name, (product, line) in found.items()}


if __name__ == "__main__":
    main()
