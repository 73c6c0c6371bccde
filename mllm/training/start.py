"""What has to be settled before the first step: the launch, the model to start from, the rows."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.training_args import ParallelMode

from mllm.assemble import assemble, assemble_checkpoint
from mllm.checkpoints import atomic_directory, is_complete, read_complete
from mllm.data.examples import Examples
from mllm.data.mixture import Mixture
from mllm.data.mixture_file import open_mixture
from mllm.errors import CheckpointError, OptionError
from mllm.load import ADAPTER_CONFIG, load_model, load_processor, merged
from mllm.processing import MllmProcessor
from mllm.training.arguments import SftArguments
from mllm.training.run_record import measure_before

Progress = Callable[[str, int | None], Callable[..., Any]]
"""Called with what is done and how often, if that is known; gives what to call each time, or with how many times."""


def check_launch(args: SftArguments) -> None:
    """Refuse several GPUs in one process: `DataParallel` cuts media tensors along their items.

    Raises:
        OptionError: More than one GPU is visible and no launcher has started a process for each.
    """
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        raise OptionError(
            f"{args.n_gpu} visible GPUs and one process",
            expected="one process for each GPU",
            do="start with `accelerate launch train/sft.py ...`, or set CUDA_VISIBLE_DEVICES to one GPU",
        )


def starting_model(args: SftArguments) -> Path:
    """The directory of the complete model to start from; parts are assembled, and adapters merged, once.

    Raises:
        CompositionError: The parts cannot be assembled.
        CheckpointError: There is no model at the path.
    """
    output_dir = Path(args.output_dir)
    if isinstance(args.model, dict):
        return assemble_once(output_dir / "assembled", args.model)
    path = Path(args.model)
    if not (path / ADAPTER_CONFIG).is_file():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"model = {args.model!r} holds no checkpoint",
                expected="a directory with config.json or adapter_config.json, or a mapping of parts to assemble",
                do="correct `model`; a run leaves its model in OUTPUT_DIR/final",
            )
        return path
    base = output_dir / "base"
    if not is_complete(base, kind="model"):
        with atomic_directory(base, kind="model", facts={"merged_from": str(path)}) as partial:
            merged(load_model(path)).save_pretrained(partial)
            load_processor(path).save_pretrained(partial)
    return base


def assemble_once(directory: Path, options: dict[str, Any]) -> Path:
    """Assemble into `directory`, unless the same parts stand there already.

    Raises:
        OptionError: Unknown keys.
        CheckpointError: Another model stands there.
    """
    known = tuple(inspect.signature(assemble).parameters)
    wrong = [key for key in options if key not in known]
    missing = [key for key in ("image_encoder", "language_model") if key not in options]
    if wrong or missing:
        raise OptionError(
            f"model: {'unknown key ' + repr(wrong[0]) if wrong else 'no ' + missing[0]}",
            expected=f"image_encoder, language_model, and of {', '.join(known[2:])} what differs from the default",
            do="correct the mapping under `model`",
        )
    if is_complete(directory, kind="model"):
        before = (read_complete(directory) or {}).get("assembled_from")
        if before != options:
            raise CheckpointError(
                f"{directory} was assembled from {before}",
                expected=f"a model assembled from {options}",
                do="choose another output directory, or delete this one yourself",
            )
        return directory
    return assemble_checkpoint(directory, **options)


def read_rows(args: SftArguments, *, progress: Progress) -> Mixture:
    """Open all rows. Rows and media are checked when they are indexed, that is once, and again when files change.

    Raises:
        OptionError, RowError, MediaError: As `open_mixture` does.
    """
    return open_mixture(args.data, seed=args.seed, progress=progress("reading data", None))


def encode_rows(rows: Mixture, args: SftArguments, processor: MllmProcessor, *, progress: Progress) -> Examples:
    """Encode and measure all rows, if they are not too many; those of a run that goes on as they were before.

    Raises:
        OptionError, RowError: As `Examples` does.
    """
    return Examples(
        rows,
        processor,
        max_length=args.max_length,
        overlong=args.overlong,
        progress=progress("encoding text", len(rows)),
        measure=measure_before(Path(args.output_dir)),
    )
