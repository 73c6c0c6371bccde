"""Supervised fine-tuning of a composed model, or of a stock one.

    accelerate launch train/sft.py --config mine.yaml [--learning_rate 1e-4 ...]
    python train/sft.py --config mine.yaml --dry_run      what the run would do
    python train/sft.py --help

The same command again goes on from the newest complete checkpoint; a finished run says so and ends.
"""

import sys
from pathlib import Path

from transformers.utils import logging

from mllm.checkpoints import is_complete
from mllm.errors import user_errors
from mllm.training.arguments import SftArguments, parse_arguments
from mllm.training.checkpoint import FINAL
from mllm.training.programs import Screen, claim, look_ahead, media_features, model_in_parts, starting_point, train
from mllm.training.sft import SftTrainer
from mllm.training.start import check_launch


def main() -> None:
    logging.disable_progress_bar()
    with user_errors():
        run(parse_arguments(sys.argv[1:]))


def run(args: SftArguments) -> None:
    """Train as the options say, and leave the model in OUTPUT_DIR/final."""
    screen = Screen(print, is_shown=args.process_index == 0)
    check_launch(args)
    if args.dry_run:
        return look_ahead(args, screen)

    # Data, and the model to start from with its processor
    start = starting_point(args, screen)

    # Parts: what is trained
    model = model_in_parts(args, start, screen)

    # This directory is ours, or not to be touched
    record = claim(args, start)
    if is_complete(Path(args.output_dir) / FINAL):
        return screen.say(f"finished before: {Path(args.output_dir) / FINAL}")

    # What frozen encoders give for all media, where it is to be kept
    features = media_features(args, start, model, screen)

    # Train, from where the run was left
    trainer = SftTrainer(
        model,
        args,
        examples=start.examples,
        processor=start.processor,
        parts=args.parts,
        base=start.base,
        record=record,
        features=features,
        validation=start.validation,
    )
    train(trainer, screen)


if __name__ == "__main__":
    main()
