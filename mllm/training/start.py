"""What has to be settled before the first step: the launch, the model to start from, the rows."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.training_args import ParallelMode

from mllm.assemble import assemble_checkpoint, assembly_options
from mllm.checkpoints import atomic_directory, is_complete, read_complete
from mllm.data.examples import Examples
from mllm.data.mixture import Mixture
from mllm.data.mixture_file import open_mixture
from mllm.data.pairs import Pairs
from mllm.errors import CheckpointError, OptionError
from mllm.load import ADAPTER_CONFIG, checkpoint_directory, load_model, load_processor, merged
from mllm.models import MllmForConditionalGeneration
from mllm.models.parts import apply_modes, checkpoint_parts, quantized_parts
from mllm.processing import MllmProcessor, TrainingProcessor
from mllm.training.arguments import SftArguments
from mllm.training.batching import prepare_attention
from mllm.training.feature_cache import CachedFeatures, cache_features, check_cacheable
from mllm.training.preference_options import PreferenceArguments
from mllm.training.run_record import measure_before
from mllm.training.sharding import check_sharding, settle_dtype, whole_models

Progress = Callable[[str, int | None], Callable[..., Any]]
"""Called with what is done and how often, if that is known; gives what to call each time, or with how many times."""


def check_launch(args: SftArguments) -> None:
    """Refuse several GPUs in one process: `DataParallel` cuts media tensors along their items. Check the sharding.

    Raises:
        OptionError: More than one GPU is visible and no launcher has started a process for each, or as
            `check_sharding` does.
    """
    check_sharding(args)
    if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED and args.n_gpu > 1:
        raise OptionError(
            f"{args.n_gpu} visible GPUs and one process",
            expected="one process for each GPU",
            do=f"start with `accelerate launch {args.program} ...`, or set CUDA_VISIBLE_DEVICES to one GPU",
        )


def starting_model(args: SftArguments, *, home: Path | None = None) -> Path:
    """The directory of the complete model to start from; parts are assembled, and adapters merged, once.

    Args:
        args: The run's options.
        home: Where a model that is made stands; by default the run's directory.

    Raises:
        CompositionError: The parts cannot be assembled.
        CheckpointError: There is no model at the path.
    """
    home = home or Path(args.output_dir)
    if isinstance(args.model, dict):
        with whole_models(args):
            return assemble_once(home / "assembled", args.model)
    try:
        path = checkpoint_directory(args.model)
    except CheckpointError as error:
        raise CheckpointError(
            f"model = {args.model!r} holds no checkpoint: {error.found}",
            expected="a directory with config.json or adapter_config.json, a model's id on the Hub, or a mapping of "
            "parts to assemble",
            do="correct `model`; a run leaves its model in OUTPUT_DIR/final",
        ) from error
    if not (path / ADAPTER_CONFIG).is_file():
        return path
    base = home / "base"
    if not is_complete(base, kind="model"):
        with whole_models(args), atomic_directory(base, kind="model", facts={"merged_from": str(path)}) as partial:
            merged(load_model(path)).save_pretrained(partial)
            load_processor(path).save_pretrained(partial)
    return base


def starting_processor(args: SftArguments, base: Path) -> TrainingProcessor:
    """The processor of the model to start from, with the chat template that was asked for.

    Raises:
        CheckpointError, OptionError: As `load_processor` does.
    """
    choice = args.chat_template
    if choice is not None and choice.endswith(".jinja"):
        path = Path(choice)
        if not path.is_file():
            raise OptionError(f"chat_template = {choice!r} is not there", expected="a file", do="correct the path")
        choice = path.read_text(encoding="utf-8")
    return load_processor(base, chat_template=choice)


def assemble_once(directory: Path, options: dict[str, Any]) -> Path:
    """Assemble into `directory`, unless the same parts stand there already.

    Raises:
        OptionError: Unknown keys.
        CheckpointError: Another model stands there.
    """
    options = assembly_options(options)
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


def trainable_model(args: SftArguments, base: Path) -> PreTrainedModel | PeftModel:
    """The model as it is trained: loaded, its parts frozen, opened, adapted, quantized and checkpointed as asked."""
    return with_modes(load_base(args, base), args)


def load_base(args: SftArguments, base: Path) -> PreTrainedModel:
    """The model to start from, quantized as asked."""
    quantized = quantized_parts(args.parts)
    if quantized and is_deepspeed_zero3_enabled():
        raise OptionError(
            f"{', '.join(quantized)} in 4 bits, under ZeRO-3",
            expected="ZeRO-2, DDP or one process: weights of 4 bits are whole on every rank",
            do="launch with train/accelerate/zero2.yaml, or remove `quantize`",
        )
    # Weights of 4 bits are made where they stay; others are loaded on the CPU and moved by the trainer.
    device = args.device if quantized else None
    return load_model(base, dtype=args.dtype, quantize=quantized, device=device)


def with_modes(model: PreTrainedModel, args: SftArguments) -> PreTrainedModel | PeftModel:
    """A loaded model with its parts frozen, opened, adapted and checkpointed as asked."""
    prepare_attention(args, model)
    set_seed(args.seed)  # adapters begin alike on all ranks, however the model was loaded: ZeRO-3 draws numbers there
    model = apply_modes(model, args.parts)
    if args.feature_cache is not None:
        check_cacheable(model, args.parts)
    settle_dtype(model, args)
    # ZeRO-3 fetches weights anew for the recomputation, which adapters survive in the older kind only.
    checkpoint_parts(model, args.parts, reentrant=isinstance(model, PeftModel) and is_deepspeed_zero3_enabled())
    if args.encoder_chunk is not None:
        set_encoder_chunk(model.get_base_model() if isinstance(model, PeftModel) else model, args.encoder_chunk)
    return model


def set_encoder_chunk(model: PreTrainedModel, items: int) -> None:
    """Let the encoders of a composed model read so many items at a time; an OptionError for a stock one."""
    if not isinstance(model, MllmForConditionalGeneration):
        raise OptionError(
            f"encoder_chunk = {items}, and the model is a {type(model).__name__}",
            expected="a composed model: a stock class calls its encoder once for all media of a batch",
            do="remove `encoder_chunk`; a smaller `per_device_train_batch_size` or `checkpointing` saves memory, too",
        )
    model.model.set_encoder_chunk(items)


def read_rows(args: SftArguments, *, progress: Progress) -> Mixture:
    """Open all rows. Rows and media are checked when they are indexed, that is once, and again when files change.

    Raises:
        OptionError, RowError, MediaError: As `open_mixture` does.
    """
    return open_mixture(args.data, seed=args.seed, progress=progress("reading data", None))


def encode_rows(rows: Mixture, args: SftArguments, processor: TrainingProcessor, *, progress: Progress) -> Examples:
    """Encode and measure all rows, if they are not too many; those of a run that goes on as they were before.

    Raises:
        OptionError, RowError: As `Examples` does.
    """
    return examples_for(args)(
        rows,
        processor,
        max_length=args.max_length,
        overlong=args.overlong,
        progress=progress("encoding text", len(rows)),
        measure=measure_before(Path(args.output_dir)),
        is_exact=args.batching == "packed",
    )


def examples_for(args: SftArguments) -> Callable[..., Examples]:
    """What rows become in a run: conversations, or pairs of answers."""
    return partial(Pairs, contrast=args.sides) if isinstance(args, PreferenceArguments) else Examples


def validation_examples(args: SftArguments, processor: TrainingProcessor, *, progress: Progress) -> Examples | None:
    """The rows of `eval_data`, read and measured like those that are trained on; None where there are to be none.

    Raises:
        OptionError, RowError, MediaError: As `open_mixture` and `Examples` do.
    """
    if not args.eval_data:
        return None
    rows = open_mixture(args.eval_data, seed=args.seed, progress=progress("reading validation data", None))
    bar = progress("encoding validation text", len(rows))
    return examples_for(args)(rows, processor, max_length=args.max_length, overlong=args.overlong, progress=bar)


def encode_media(
    args: SftArguments,
    model: torch.nn.Module,
    examples: Examples,
    processor: TrainingProcessor,
    *,
    say: Callable[[str], Any],
    progress: Progress,
) -> CachedFeatures | None:
    """Have what the frozen encoders give for all media of the run in `feature_cache`, if there is to be one.

    Raises:
        OptionError, MediaError, CheckpointError: As `check_cacheable` and `cache_features` do.
    """
    if args.feature_cache is None:
        return None
    composed = check_cacheable(model, args.parts)
    assert isinstance(processor, MllmProcessor)  # as the model is ours
    return cache_features(
        Path(args.output_dir, args.feature_cache),
        examples,
        composed,
        processor,
        device=args.device,
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        num_workers=args.dataloader_num_workers,
        say=say,
        progress=progress,
    )
