"""How rows become the micro-batches of a run: which share one, and how a batch of them is made."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mllm.data.batch_plan import BatchPlan, LengthPlan, PackedPlan, RandomPlan, row_costs
from mllm.data.collate import Collator, PackingCollator, PaddingCollator
from mllm.data.collate_pairs import PairCollator
from mllm.data.examples import Examples
from mllm.data.pairs import names_of_sides
from mllm.data.row_lengths import lengths_of_media
from mllm.errors import RowError
from mllm.models.parts import summarize_parts
from mllm.models.segment_attention import isolate_segments
from mllm.models.supervised import takes_shared_media
from mllm.processing import TrainingProcessor
from mllm.training.arguments import SftArguments
from mllm.training.preference_options import PreferenceArguments

FORWARD, THROUGH, TRAINED = 1, 2, 3
"""What a part costs in passes: a forward; also gradients of what it reads; also those of its weights."""


def plan_batches(args: SftArguments, examples: Examples, model: PreTrainedModel | PeftModel) -> BatchPlan:
    """The micro-batches of all ranks, for all epochs of the run.

    Raises:
        RowError: A row is longer than a pack.
    """
    if args.batching == "random":
        return RandomPlan(examples.order, args.per_device_train_batch_size, args.world_size, args.seed)
    media_tokens = lengths_of_media(examples.rows, examples.processor)[examples.used]
    width, share = model.config.get_text_config().hidden_size, encoder_share(args, model)
    lengths = examples.lengths.astype(np.int64)
    costs = row_costs(lengths, media_tokens, width=width, encoder_share=share)
    shared: dict[str, Any] = {
        "order": examples.order, "lengths": lengths, "costs": costs, "world_size": args.world_size,
        "seed": args.seed,
    }  # fmt: skip
    if args.batching == "length":
        return LengthPlan(batch_size=args.per_device_train_batch_size, **shared)
    _check_lengths(examples, args)
    return PackedPlan(pack_length=pack_length(args), num_epochs=lambda steps: epochs_of(args, steps), **shared)


def make_collator(
    args: SftArguments, processor: TrainingProcessor, **kwargs: Any
) -> PaddingCollator | PackingCollator:
    """What makes batches for training; `kwargs` are the collator's."""
    return (PackingCollator if args.batching == "packed" else PaddingCollator)(processor, **kwargs)


def collator_of(
    args: SftArguments,
    texts: PaddingCollator | PackingCollator,
    model: torch.nn.Module,
    *,
    reference: Callable[[int], Sequence[float]] | None = None,
) -> Collator:
    """What makes batches of what a run is trained on, conversations or pairs, out of what makes them of conversations.

    Args:
        args: The run's options.
        texts: Padded or packed.
        model: Whether it takes a picture once that stands in several conversations.
        reference: Of preferences: what the reference says of a row, where that is known.
    """
    if not isinstance(args, PreferenceArguments):
        return texts
    return PairCollator(texts, contrast=args.sides, shares_media=takes_shared_media(model), reference=reference)


def prepare_attention(args: SftArguments, model: PreTrainedModel) -> None:
    """Give a model that is to be trained on packs an attention that keeps their rows apart.

    Raises:
        OptionError: There is no such attention for it.
    """
    if args.batching == "packed":
        isolate_segments(model, longest=min(pack_length(args), args.max_length or pack_length(args)))


def pack_length(args: SftArguments) -> int:
    """Tokens of a packed micro-batch: by default the longest row finds room, with all its conversations."""
    if args.pack_length is not None:
        return args.pack_length
    assert args.max_length is not None, "checked with the options"
    return args.max_length * conversations_of_row(args)


def conversations_of_row(args: SftArguments) -> int:
    """How many conversations a row is trained on as: one, or the sides of a preference."""
    return len(names_of_sides(args.sides)) if isinstance(args, PreferenceArguments) else 1


def epochs_of(args: SftArguments, num_batches: int) -> int:
    """How many epochs a run begins whose ranks have so many micro-batches in each; as `Trainer` counts."""
    if args.max_steps > 0:
        return -(-args.max_steps // max(1, -(-num_batches // args.gradient_accumulation_steps)))
    return math.ceil(args.num_train_epochs)


def encoder_share(args: SftArguments, model: PreTrainedModel | PeftModel) -> float:
    """What the encoders spend for a media token, in units of a token's way through the language model.

    By the number of weights each of them passes, and how often: forward and, for what is trained or has something
    trained in front of it, backward.
    """
    parts = {part.name: part for part in summarize_parts(model, args.parts, learning_rate=0.0)}
    text = parts.pop("text")
    passes = TRAINED if text.trainable else THROUGH
    encoders = [part for name, part in parts.items() if name.endswith(".encoder")]
    if args.feature_cache is not None:
        encoders = [part for part in encoders if part.trainable]
    spent = sum(part.parameters * (TRAINED if part.trainable else FORWARD) for part in encoders)
    return spent / max(1, text.parameters * passes)


def _check_lengths(examples: Examples, args: SftArguments) -> None:
    longest, several = int(examples.lengths.argmax()), conversations_of_row(args)
    if examples.lengths[longest] > pack_length(args):
        row = examples.rows[int(examples.used[longest])]
        rest = "it" if several == 1 else f"a share of it: each of a row's {several} conversations may be so long"
        raise RowError(
            f"{row.name} has {examples.lengths[longest]} tokens, and pack_length is {pack_length(args)}",
            expected="rows that find room in a pack",
            do=f"raise `pack_length`, or lower `max_length` to {rest}, so that longer rows are dropped",
        )
