"""Measure a step of our preference training beside a step of TRL's `DPOTrainer` on images.

    python scripts/benchmark_preference.py --out benchmark_preference.json
    python scripts/benchmark_preference.py --out quick.json --quick      # a smoke test, its figures mean nothing

Both sides train LoRA (rank 16, all linear layers of the language model) on the same stock
`LlavaForConditionalGeneration` and the same pairs in the same order, in float32 (on a GPU with bfloat16 autocast),
padded, with dropout and activation checkpointing off and encoder and connector frozen. TRL compares two texts under
one image; so does our `dpo`; our `rdpo` also compares the image with another one. The reference is the same weights
without adapters: asked in every step by TRL and in our `live` runs, and before the first step in the others. A step is
from the end of one to the end of the next, with reading and preparing its rows; the first is left out. Every trial is
one epoch in a process of its own, in turn.

Keys of the result, and what was predicted before anything was measured:

    dpo_step_ratio     our dpo with a precomputed reference / TRL. Predicted 0.63, at most 0.7. In units of one text's
                       forward F through the language model, backward with LoRA 1.15 F and an image's way through the
                       encoder 0.2 F: TRL 2 x (1 + 1 + 1.15) + 4 x 0.2 = 7.1; ours 2 x 2.15 + 0.2 = 4.5.
    rdpo_step_ratio    the same with three texts and two images: 3 x 2.15 + 0.4 = 6.85. Predicted 0.96, at most 1.1.
    dpo_live_ratio     2 x 3.15 + 0.2 = 6.5: all that is spared are three of four times the encoder. Predicted 0.92, at
                       most 1.0.
    rdpo_live_ratio    3 x 3.15 + 0.4 = 9.85. Predicted 1.39, at most 1.5.
    dpo_ratio_with_pass_over_1, _over_3; rdpo_ratio_...
                       with the pass over all pairs spread over the steps of so many epochs. Predicted for dpo 0.92 and
                       0.73, for rdpo 1.39 and 1.10: over one epoch there is nothing to gain but memory.

and the raw figures: `machine`, `step_seconds`, `spread` (slowest over fastest trial), `pass_seconds`, `batches` (of a
step the rows, the padded length and the images that are encoded), `first_log_probs` of each side (the same tokens give
the same log-probabilities), `peak_mib`, `trials`.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from mllm.errors import user_errors
from training_benchmark.preferences import compare_steps
from training_benchmark.process import machine, runner

QUICK: dict[str, Any] = {"shape": "quick", "pairs_of_a_step": 2, "steps": 3, "repeats": 1, "bf16": False}
FULL: dict[str, Any] = {"shape": "throughput", "pairs_of_a_step": 4, "steps": 7, "repeats": 3, "bf16": False}
GPU: dict[str, Any] = {"shape": "gpu", "pairs_of_a_step": 8, "steps": 21, "repeats": 3, "bf16": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few pairs, about a minute")
    parser.add_argument("--dir", type=Path, help="where rows and models are made, and kept; temporary by default")
    parser.add_argument("--threads", type=int, help="of each process; one a core by default")
    parser.add_argument("--pairs", type=int, help="of a step; by default 4, on a GPU 8")
    args = parser.parse_args()
    with user_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measure, and write what was measured."""
    figures: dict[str, Any] = {"machine": machine(args.threads), "quick": args.quick}
    plan = QUICK if args.quick else FULL if figures["machine"]["gpu"] is None else GPU
    plan = plan | ({} if args.pairs is None else {"pairs_of_a_step": args.pairs})
    with tempfile.TemporaryDirectory() as temporary:
        directory = (args.dir or Path(temporary)) / plan["shape"]
        figures |= {"plan": plan, **compare_steps(plan, directory, runner(figures["machine"]["threads"]))}
    args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in figures.items() if isinstance(value, float)}, indent=1))


if __name__ == "__main__":
    main()
