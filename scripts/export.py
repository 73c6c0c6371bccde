"""Export a trained model as a stock transformers checkpoint, proven equal, and push it to the Hub if you like.

    python scripts/export.py runs/quickstart/run/sft/final --out export
    python scripts/export.py runs/quickstart/run/sft/final --out export --push_to_hub ORG/NAME

An adapter is merged. The directory is reloaded in a fresh process with transformers alone, and gets its name only if
ids, pixels, logits and greedy answers are those of the model. Then

    AutoModelForImageTextToText.from_pretrained("export")

loads it anywhere, without mllm.
"""

import argparse
from pathlib import Path

from transformers.utils import logging

from mllm.errors import user_errors
from mllm.export import export, push
from mllm.export.probes import probes_from_rows


def main() -> None:
    """Export, say how it compares, push."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory, an adapter's too")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; it must not exist")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; as trained by default")
    parser.add_argument("--target", help="stock class to export to; the first that can express the model by default")
    parser.add_argument("--rows", type=Path, help="row file whose questions are compared instead of the built-in ones")
    parser.add_argument("--num_rows", type=int, default=32, help="how many of its rows")
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="repository to upload the verified export to")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args()
    logging.disable_progress_bar()
    with user_errors():
        report = export(
            args.model,
            args.out,
            dtype=args.dtype,
            target=args.target,
            probes=probes_from_rows(args.rows, limit=args.num_rows) if args.rows else None,
            title=args.push_to_hub,
        )
        print(f"{args.out}: {report.architecture}, {report.num_parameters:,} parameters, {report.num_bytes:,} bytes")
        print(f"  weights         {report.dtype} (trained in {report.trained_dtype})")
        if report.merge_max_abs_diff is not None:
            print(f"  merged adapter  logits differ by at most {report.merge_max_abs_diff:.1g}")
        print(f"  in a process with transformers alone, over {report.num_probes} conversations:")
        print(f"  logits          differ by at most {report.max_abs_diff:.1g} (allowed: {report.tolerance:.1g})")
        print(f"  tokens          {'the same' if report.same_tokens else 'differ'}")
        print(f"  took            {report.seconds} s")
        if args.push_to_hub:
            print(f"  pushed to       {push(args.out, args.push_to_hub, private=args.private)}")


if __name__ == "__main__":
    main()
