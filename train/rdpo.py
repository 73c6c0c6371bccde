"""Preference training: a better answer against a worse one, and a picture against another.

    accelerate launch train/rdpo.py --config mine.yaml [--preset rdpo --learning_rate 1e-5 ...]
    python train/rdpo.py --config mine.yaml --dry_run      what the run would do
    python train/rdpo.py --help

The same command again goes on from the newest complete checkpoint; a finished run says so and ends.
"""

import sys
from pathlib import Path

from transformers.utils import logging

from mllm.checkpoints import is_complete
from mllm.errors import user_errors
from mllm.training.arguments import parse_arguments
from mllm.training.checkpoint import FINAL
from mllm.training.preference import MultimodalDPOTrainer
from mllm.training.preference_options import PreferenceArguments
from mllm.training.preference_plot import draw_preference
from mllm.training.programs import Screen, claim, look_ahead, media_features, model_in_parts, starting_point, train
from mllm.training.reference_model import check_reference, reference_model
from mllm.training.reference_pass import known_reference
from mllm.training.start import check_launch


def main() -> None:
    logging.disable_progress_bar()
    with user_errors():
        run(parse_arguments(sys.argv[1:], PreferenceArguments))


def run(args: PreferenceArguments) -> None:
    """Train as the options say, and leave the model in OUTPUT_DIR/final."""
    screen = Screen(print, is_shown=args.process_index == 0)
    check_launch(args)
    if args.dry_run:
        return look_ahead(args, screen)

    # Preferences, and the model to start from with its processor
    start = starting_point(args, screen)

    # Parts: what is trained
    model = model_in_parts(args, start, screen)
    check_reference(args, model)

    # This directory is ours, or not to be touched
    record = claim(args, start)
    if is_complete(Path(args.output_dir) / FINAL):
        return screen.say(f"finished before: {Path(args.output_dir) / FINAL}")

    # What frozen encoders give for all media, where it is to be kept
    features = media_features(args, start, model, screen)

    # What the policy is compared with: what a model said of all pairs before the first step, or that model
    known = known_reference(args, start, model, features=features, record=record, screen=screen)
    reference = reference_model(args, start.base, model) if known is None else None

    # Train, from where the run was left
    trainer = MultimodalDPOTrainer(
        model,
        args,
        reference=reference,
        known=known,
        examples=start.examples,
        processor=start.processor,
        parts=args.parts,
        base=start.base,
        record=record,
        features=features,
        validation=start.validation,
    )
    train(trainer, screen)

    # What became of rewards, margins and accuracies
    if screen.is_shown and not draw_preference(args.output_dir):
        screen.say("no picture of the run: matplotlib is not installed")


if __name__ == "__main__":
    main()
