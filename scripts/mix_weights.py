"""Mix the weights of language models that were tuned from one base model.

    python scripts/mix_weights.py REAL SYNTHETIC --beta 0.5 --out mixed
    python scripts/mix_weights.py A B C --weights 0.5 0.3 0.2 --out mixed --dtype bfloat16

With --beta the mixture is beta * first + (1 - beta) * second, as SPHINX mixes a model that learned from real captions
with one that learned from synthetic ones. Weights are read from disk slice by slice; no model is loaded.
"""

import argparse
from pathlib import Path

from transformers.utils import logging

from mllm.errors import OptionError, user_errors
from mllm.weight_mixing import mix_checkpoints


def main() -> None:
    """Mix, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="directories or Hub ids of the models")
    shares = parser.add_mutually_exclusive_group(required=True)
    shares.add_argument("--beta", type=float, help="share of the first of two models; the second has the rest")
    shares.add_argument("--weights", type=float, nargs="+", help="one for each model, which add up to 1")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; it must not exist")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; that of the first model by default")
    args = parser.parse_args()
    logging.disable_progress_bar()
    with user_errors():
        report = mix_checkpoints(args.models, _weights(args), args.out, dtype=args.dtype)
    print(
        f"{args.out}: {report.num_parameters:,} parameters in {report.num_tensors} tensors, {report.num_files} files"
    )


def _weights(args: argparse.Namespace) -> list[float]:
    if args.weights is not None:
        return args.weights
    if len(args.models) != 2 or not 0 <= args.beta <= 1:
        raise OptionError(
            f"--beta {args.beta:g} with {len(args.models)} models",
            expected="a number from 0 to 1, and two models",
            do="use --weights for any other mixture",
        )
    return [args.beta, 1 - args.beta]


if __name__ == "__main__":
    main()
