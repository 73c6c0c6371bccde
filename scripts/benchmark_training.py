"""Measure our trainer beside TRL's `SFTTrainer`: rows a second, memory, loss; and what a feature cache is worth.

    python scripts/benchmark_training.py --out benchmark_training.json
    python scripts/benchmark_training.py --out quick.json --quick        # a smoke test, its figures mean nothing

Both sides train the same stock `LlavaForConditionalGeneration` on the same rows, in float32, with the encoder frozen,
without activation checkpointing and without a limit of length; rows and models are made here, the same every time
(`training_benchmark/mixture.py` and `checkpoints.py` state them). Every trial is one epoch in a process of its own.
Both sides are tuned first, on a part of the rows: TRL over batch sizes and workers, ours over batching, pack length
and workers. Seconds are those of reading and encoding rows and of training; loading the model and saving it are left
out on both sides. Memory is the peak of the training process above what it held after its imports.

Keys of the result, and what was predicted before anything was measured:

    rows_per_second_ratio      ours / TRL, each at its best. Predicted 2.0 to 2.5. TRL has to choose between padding
                               (about 45 % in batches of 8) and batches of 1, which will be its best on two cores. Then
                               only the head is left to win by: on a CPU TRL scores all positions, where one in four is
                               learned, and computes the logits twice. So the ratio hangs on the head's size:
                               `rows_per_second_ratio_small_head`, with half the vocabulary, predicted 1.5.
                               `rows_per_second_ratio_grouped` is against TRL grouping by lengths given to it.
    peak_memory_ratio          ours / TRL with a vocabulary of 151,936 and rows of the published lengths, each at its
                               fastest. Predicted 0.6 for full training, where weights, gradients and AdamW's moments
                               are the same on both sides; 0.5 with LoRA (`peak_memory_ratio_lora`), where they are
                               small.
    cached_alignment_of_bound  speed-up of the feature cache / its bound 1 / (1 - share of decoding, preprocessing and
                               encoder), the smaller of two models. Predicted 0.95: what is left is reading features.

and the raw figures: `machine`, `tokens` (what the rows are, and that both sides learn the same tokens of them),
`trials` (every one), `best`, `loss_curves` (also OUT.png), `shares` (where the time of each side goes), `memory`,
`alignment`, and `gpu` where there is one.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from mllm.errors import user_errors
from training_benchmark import alignment, comparison, utilisation
from training_benchmark.picture import draw_losses
from training_benchmark.process import Trial, machine, runner

QUICK = {
    "shape": "quick", "share_shapes": ("quick",), "memory_shape": "quick", "alignment_shape": "quick",
    "rows": 16, "sweep_rows": 8, "step_rows": 8, "repeats": 1, "workers": (0,),
    "trl_batches": (4,), "grouped": (), "packs": (1024,), "lengths": (),
    "memory_pool": None, "memory_rows": 3, "memory_batches": (2,), "modes": ("full",),
    "curve_shape": "quick", "curve_epochs": 2, "caption_rows": 32, "digit_scenes": 0,
}  # fmt: skip
FULL = {
    "shape": "throughput", "share_shapes": ("throughput", "small_head"), "memory_shape": "memory",
    "alignment_shape": "alignment", "rows": 48, "sweep_rows": 16, "step_rows": 16, "repeats": 2, "workers": (0, 2),
    "trl_batches": (1, 2, 4, 8, 16), "grouped": (4,), "packs": (1024, 2048, 4096), "lengths": (2, 4),
    "memory_pool": 40, "memory_rows": 3, "memory_batches": (1, 2),
    "modes": ("full", "lora"), "curve_shape": "curves", "curve_epochs": 8, "caption_rows": 96, "digit_scenes": 960,
}  # fmt: skip
GPU = FULL | {
    "shape": "gpu", "rows": 512, "sweep_rows": 96, "step_rows": 32, "workers": (0, 8),
    "trl_batches": (4, 8, 16, 32), "grouped": (16,), "packs": (4096, 8192, 16384), "lengths": (16,),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; a picture is put beside it")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rows, less than a minute")
    parser.add_argument("--dir", type=Path, help="where rows and models are made, and kept; temporary by default")
    parser.add_argument("--threads", type=int, help="of each process; one a core by default")
    parser.add_argument("--only", nargs="*", choices=MEASURES, default=list(MEASURES), help="measure these alone")
    args = parser.parse_args()
    with user_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Take the measures in turn; what is measured is written at once."""
    figures: dict[str, Any] = {"machine": machine(args.threads), "quick": args.quick}
    trial = runner(figures["machine"]["threads"])
    with tempfile.TemporaryDirectory() as temporary:
        directory = (args.dir or Path(temporary)) / ("quick" if args.quick else "full")
        plan = QUICK if args.quick else FULL
        for name in args.only:
            print(f"--- {name}", flush=True)
            figures |= MEASURES[name](plan, directory, trial, figures)
            args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if "loss_curves" in figures and not draw_losses(figures["loss_curves"], args.out.with_suffix(".png")):
        print("no picture of the losses: matplotlib is not installed")
    print(json.dumps({name: value for name, value in figures.items() if isinstance(value, float)}, indent=1))


# --- measures: functions of the plan, the directory, what runs a trial, and the figures so far -----------------------


def measure_tokens(plan: dict[str, Any], directory: Path, trial: Trial, figures: dict[str, Any]) -> dict[str, Any]:
    """Encode all rows on both sides and compare, before any speed is compared."""
    return {"tokens": comparison.compare_tokens(plan, directory, trial)}


def measure_speed(plan: dict[str, Any], directory: Path, trial: Trial, figures: dict[str, Any]) -> dict[str, Any]:
    """Tune both sides on a part of the rows, then train on all of them, in turn."""
    return comparison.compare_speed(plan, directory, trial, figures["tokens"])


def measure_alignment(plan: dict[str, Any], directory: Path, trial: Trial, figures: dict[str, Any]) -> dict[str, Any]:
    """Train a connector alone, with and without cached features."""
    specs = {"llava": alignment.llava_spec(directory, plan["alignment_shape"], plan["caption_rows"])}
    if plan["digit_scenes"]:
        specs["digits"] = alignment.digits_spec(directory, plan["digit_scenes"])
    return alignment.compare(specs, trial, repeats=plan["repeats"])


def measure_gpu(plan: dict[str, Any], directory: Path, trial: Trial, figures: dict[str, Any]) -> dict[str, Any]:
    """The same on a GPU, if there is one, with a model of more than a billion parameters and bfloat16 autocast."""
    device = figures["machine"]["gpu"]
    if device is None:
        return {"gpu": None}
    tokens = comparison.compare_tokens(GPU, directory / "gpu", trial)
    found = comparison.compare_speed(GPU, directory / "gpu", trial, tokens)
    return {"gpu": {"tokens": tokens, **found, **utilisation.of_both(found, tokens, GPU, device)}}


MEASURES = {
    "tokens": measure_tokens,
    "speed": measure_speed,
    "losses": comparison.compare_losses,
    "shares": comparison.find_shares,
    "memory": comparison.compare_memory,
    "alignment": measure_alignment,
    "gpu": measure_gpu,
}


if __name__ == "__main__":
    main()
