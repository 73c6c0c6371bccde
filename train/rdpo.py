"""Preference training: a better answer against a worse one, and a picture against another.

    accelerate launch train/rdpo.py --config mine.yaml [--preset rdpo --learning_rate 1e-5 ...]
    python train/rdpo.py --config mine.yaml --dry_run      what the run would do
    python train/rdpo.py --help

The same command again goes on from the newest complete checkpoint; a finished run says so and ends.
"""

import sys
from functools import partial
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm
from transformers import set_seed
from transformers.utils import logging

from mllm.checkpoints import is_complete
from mllm.data.left_out import QUARANTINE
from mllm.errors import user_errors
from mllm.models.parts import summarize_parts
from mllm.training.arguments import parse_arguments
from mllm.training.checkpoint import FINAL, latest_checkpoint
from mllm.training.preference import MultimodalDPOTrainer
from mllm.training.preference_options import PreferenceArguments
from mllm.training.preflight import PREFLIGHT, preflight, report_text, write_report
from mllm.training.run_record import claim_directory, describe_run, refuse_foreign_directory
from mllm.training.start import (
    check_launch,
    encode_media,
    encode_rows,
    read_rows,
    reference_model,
    starting_model,
    starting_processor,
    trainable_model,
    validation_examples,
)


def main() -> None:
    logging.disable_progress_bar()
    with user_errors():
        run(parse_arguments(sys.argv[1:], PreferenceArguments))


def run(args: PreferenceArguments) -> None:
    """Train as the options say, and leave the model in OUTPUT_DIR/final."""
    is_main, output_dir = args.process_index == 0, Path(args.output_dir)
    say, progress = print if is_main else lambda *_: None, partial(bar, is_shown=is_main)
    check_launch(args)
    if args.dry_run:
        return look_ahead(args)
    set_seed(args.seed)

    # Data: missing files, malformed rows and bad media are found before anything is written
    refuse_foreign_directory(output_dir)
    with PartialState().main_process_first():
        rows = read_rows(args, progress=progress)

    # The model to start from, and its processor
    with PartialState().main_process_first():
        base = starting_model(args)
    processor = starting_processor(args, base)
    examples = encode_rows(rows, args, processor, progress=progress)
    say(f"rows: {len(examples)} used, dropped: {dict(examples.dropped) or 'none'}")
    if examples.num_unmeasured:
        say(f"      {examples.num_unmeasured} of them may be found to be longer than max_length when they are due")
    with PartialState().main_process_first():
        validation = validation_examples(args, processor, progress=progress)

    # Parts: what is trained
    model = trainable_model(args, base)
    for part in summarize_parts(model, args.parts, learning_rate=args.learning_rate):
        rate = "" if part.learning_rate is None else f"  learning rate {part.learning_rate:g}"
        say(f"{part.name:<16} {part.mode:<7} {part.trainable:>14,} of {part.parameters:>14,} trained{rate}")

    # This directory is ours, or not to be touched
    record = describe_run(args, base=base, rows=rows, examples=examples)
    with PartialState().main_process_first():
        claim_directory(output_dir, record)
        examples.account.write_to(output_dir / QUARANTINE)
    if is_complete(output_dir / FINAL):
        return say(f"finished before: {output_dir / FINAL}")

    # What frozen encoders give for all media, where it is to be kept
    features = encode_media(args, model, examples, processor, say=say, progress=progress)

    # What the policy is compared with
    reference = reference_model(args, base, model)

    # Train, from where the run was left
    trainer = MultimodalDPOTrainer(
        model,
        args,
        reference=reference,
        examples=examples,
        processor=processor,
        parts=args.parts,
        base=base,
        record=record,
        features=features,
        validation=validation,
    )
    checkpoint = latest_checkpoint(output_dir)
    if checkpoint:
        say(f"going on from {checkpoint}")
    trainer.train_from(checkpoint)
    final = trainer.save_final()
    if left_out := trainer.record["rows"].get("left_out"):
        say(f"rows left out of their batches: {left_out}")
    say(f"model: {final}")


def look_ahead(args: PreferenceArguments) -> None:
    """Say what the run would do, also in OUTPUT_DIR/preflight.json; nothing else is written."""
    if args.process_index != 0:
        return
    report = preflight(args, progress=partial(bar, is_shown=True))
    write_report(report, Path(args.output_dir) / PREFLIGHT)
    print(report_text(report))


def bar(what: str, total: int | None, *, is_shown: bool):
    """A progress bar of what takes longer than a second; returns what to call for each row, or with how many."""
    return tqdm(total=total, desc=what, unit="row", disable=not is_shown, mininterval=0.5, delay=1).update


if __name__ == "__main__":
    main()
