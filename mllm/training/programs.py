"""What the programs in `train/` share: each function here is a line of their story."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed

from mllm.data.examples import Examples
from mllm.data.left_out import QUARANTINE
from mllm.data.mixture import Mixture
from mllm.models.parts import summarize_parts
from mllm.processing import TrainingProcessor
from mllm.training.checkpoint import latest_checkpoint
from mllm.training.feature_cache import CachedFeatures
from mllm.training.options import SftArguments
from mllm.training.preflight import PREFLIGHT, preflight, report_text, write_report
from mllm.training.run_record import claim_directory, describe_run, refuse_foreign_directory
from mllm.training.start import (
    encode_media,
    encode_rows,
    read_rows,
    starting_model,
    starting_processor,
    trainable_model,
    validation_examples,
)
from mllm.training.trainer import MllmTrainer


class Screen:
    """What a person sees of a run: lines and progress bars, those of the first process alone.

    Args:
        write: Shows a line.
        is_shown: Whether this process shows anything.
    """

    def __init__(self, write: Callable[[str], Any], *, is_shown: bool):
        self._write = write
        self.is_shown = is_shown

    def say(self, line: str) -> None:
        """Show a line."""
        if self.is_shown:
            self._write(line)

    def progress(self, what: str, total: int | None) -> Callable[..., Any]:
        """A bar of what takes longer than a second; returns what to call for each row, or with how many."""
        return tqdm(total=total, desc=what, unit="row", disable=not self.is_shown, mininterval=0.5, delay=1).update


@dataclass(frozen=True)
class StartingPoint:
    """What a run starts from.

    Args:
        base: Directory of the complete model.
        processor: The model's.
        rows: All rows.
        examples: Those that are trained on.
        validation: Those that are validated on, if there are to be any.
    """

    base: Path
    processor: TrainingProcessor
    rows: Mixture
    examples: Examples
    validation: Examples | None


def look_ahead(args: SftArguments, screen: Screen) -> None:
    """Say what the run would do, also in OUTPUT_DIR/preflight.json; nothing else is written."""
    if screen.is_shown:
        report = preflight(args, progress=screen.progress)
        write_report(report, Path(args.output_dir) / PREFLIGHT)
        screen.say(report_text(report))


def starting_point(args: SftArguments, screen: Screen) -> StartingPoint:
    """Rows, and the model that they are for: read, checked and encoded before anything is written.

    The first process leads where files are made that the others then find.

    Raises:
        MllmError: Missing files, malformed rows, bad media, no model, or a directory that is somebody else's.
    """
    set_seed(args.seed)
    refuse_foreign_directory(Path(args.output_dir))
    with PartialState().main_process_first():
        rows = read_rows(args, progress=screen.progress)
    with PartialState().main_process_first():
        base = starting_model(args)
    processor = starting_processor(args, base)
    examples = encode_rows(rows, args, processor, progress=screen.progress)
    screen.say(f"rows: {len(examples)} used, dropped: {dict(examples.dropped) or 'none'}")
    if examples.num_unmeasured:
        screen.say(
            f"      {examples.num_unmeasured} of them may be found to be longer than max_length when they are due"
        )
    with PartialState().main_process_first():
        validation = validation_examples(args, processor, progress=screen.progress)
    return StartingPoint(base, processor, rows, examples, validation)


def model_in_parts(args: SftArguments, start: StartingPoint, screen: Screen) -> PreTrainedModel | PeftModel:
    """The model, with each of its parts frozen, adapted or opened as asked; the parts are shown."""
    model = trainable_model(args, start.base)
    for part in summarize_parts(model, args.parts, learning_rate=args.learning_rate):
        rate = "" if part.learning_rate is None else f"  learning rate {part.learning_rate:g}"
        screen.say(f"{part.name:<16} {part.mode:<7} {part.trainable:>14,} of {part.parameters:>14,} trained{rate}")
    return model


def claim(args: SftArguments, start: StartingPoint) -> dict[str, Any]:
    """Make the run's directory ours: begin its record, which is returned, and its quarantine list.

    Raises:
        CheckpointError: It holds another run, or something else.
    """
    output_dir = Path(args.output_dir)
    record = describe_run(args, base=start.base, rows=start.rows, examples=start.examples)
    with PartialState().main_process_first():
        claim_directory(output_dir, record)
        start.examples.account.write_to(output_dir / QUARANTINE)
    return record


def media_features(
    args: SftArguments, start: StartingPoint, model: PreTrainedModel | PeftModel, screen: Screen
) -> CachedFeatures | None:
    """What frozen encoders give for all media of the run, where it is to be kept."""
    return encode_media(args, model, start.examples, start.processor, say=screen.say, progress=screen.progress)


def train(trainer: MllmTrainer, screen: Screen) -> None:
    """Train from where the run was left, and write the model to OUTPUT_DIR/final."""
    checkpoint = latest_checkpoint(Path(trainer.args.output_dir))
    if checkpoint:
        screen.say(f"going on from {checkpoint}")
    trainer.train_from(checkpoint)
    final = trainer.save_final()
    if left_out := trainer.record["rows"].get("left_out"):
        screen.say(f"rows left out of their batches: {left_out}")
    screen.say(f"model: {final}")
