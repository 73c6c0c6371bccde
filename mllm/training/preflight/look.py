"""Go through the beginning of a run, and stop before anything of it is written."""

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mllm.checkpoints import is_complete
from mllm.data.collate import Collated, LeavingOut
from mllm.data.examples import Examples
from mllm.data.left_out import LeftOut
from mllm.training.arguments import SftArguments
from mllm.training.batching import collator_of, make_collator, pack_length, plan_batches, prepare_attention
from mllm.training.checkpoint import FINAL, latest_checkpoint
from mllm.training.preference_options import PreferenceArguments
from mllm.training.preflight.data_facts import batch_facts, length_facts, plan_facts, source_facts
from mllm.training.preflight.estimate import estimate_memory, layers_of_parts
from mllm.training.preflight.model_facts import group_facts, part_facts
from mllm.training.preflight.report import PlanFacts, Preflight, StepFacts
from mllm.training.reference_model import check_reference
from mllm.training.run_record import RUN_RECORD, claim_directory, describe_run, refuse_foreign_directory
from mllm.training.sharding import whole_models
from mllm.training.start import (
    Progress,
    encode_rows,
    load_base,
    read_rows,
    starting_model,
    starting_processor,
    validation_examples,
    with_modes,
)

PREFLIGHT = "preflight.json"


def preflight(args: SftArguments, *, progress: Progress) -> Preflight:
    """What a run with these options would do. One process alone finds that out, whatever the number of ranks.

    A model that would have to be assembled or merged first is so in a temporary directory.

    Raises:
        MllmError: What the run itself would raise before its first step.
    """
    output_dir = Path(args.output_dir)
    refuse_foreign_directory(output_dir)
    rows = read_rows(args, progress=progress)
    with TemporaryDirectory() as scratch:
        is_made = any(is_complete(output_dir / name, kind="model") for name in ("assembled", "base"))
        base = starting_model(args, home=output_dir if is_made else Path(scratch))
        processor = starting_processor(args, base)
        examples = encode_rows(rows, args, processor, progress=progress)
        validation = validation_examples(args, processor, progress=progress)
        with whole_models(args):
            plain = load_base(args, base)
        layers = layers_of_parts(plain, args)
        if isinstance(args, PreferenceArguments):
            check_reference(args, plain)
        model = with_modes(plain, args)
        prepare_attention(args, plain)
        if (output_dir / RUN_RECORD).is_file():  # then this only compares
            claim_directory(output_dir, describe_run(args, base=base, rows=rows, examples=examples))

    plan = plan_batches(args, examples, model)
    places = pack_length(args) if args.batching == "packed" else None
    figures, first, largest = plan_facts(
        plan, examples.lengths, batching=args.batching, world_size=args.world_size, pack_length=places
    )
    collate = LeavingOut(collator_of(args, make_collator(args, processor), model))
    shown, batch = collated(collate, examples, first[0])
    _, heaviest = collated(collate, examples, largest)
    decay, rate = args.weight_decay, args.learning_rate
    return Preflight(
        model=str(args.model),
        model_class=type(plain).__name__,
        parts=part_facts(model, args.parts, layers, learning_rate=rate),
        groups=group_facts(model, args.parts, learning_rate=rate, weight_decay=decay),
        sources=source_facts(examples),
        validation=source_facts(validation) if validation is not None else (),
        lengths=length_facts(examples),
        plan=figures,
        steps=step_facts(args, figures),
        memory=estimate_memory(args, plain, model, layers, heaviest),
        batch=batch_facts(processor.tokenizer, batch.batch, shown[0]),
    )


def step_facts(args: SftArguments, plan: PlanFacts) -> StepFacts:
    """How long the run is, as transformers' trainer counts its steps."""
    output_dir = Path(args.output_dir)
    per_epoch = max(1, math.ceil(plan.micro_batches / args.gradient_accumulation_steps))
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    checkpoint = latest_checkpoint(output_dir)
    return StepFacts(
        per_epoch=per_epoch,
        total=total,
        epochs=total / per_epoch,
        rows_per_step=plan.rows / per_epoch,
        tokens_per_step=plan.tokens / per_epoch,
        goes_on_from=checkpoint.name if checkpoint else None,
        is_finished=is_complete(output_dir / FINAL),
    )


def collated(
    collate: LeavingOut, examples: Examples, positions: Sequence[int] | np.ndarray
) -> tuple[list[Any], Collated]:
    """The rows at these positions that can be trained on, encoded, and the micro-batch of them.

    Raises:
        MllmError: One of them is broken, and its source wants that to be an error.
    """
    found = [examples[int(position)] for position in positions]
    batch = collate(found)
    for row in batch.left_out:
        examples.account.add(row)
    return [row for row in found if not isinstance(row, LeftOut)], batch
