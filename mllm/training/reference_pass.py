"""What a reference says of all pairs of a run, asked before its first step and kept on disk.

A step then asks the policy alone, and a reference that is another model is not held beside it. Ranks share the work, a
pass that was interrupted goes on, and a run with the same reference and the same pairs only reads.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader

from mllm.data.collate import Collated, Features, LeavingOut, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.indexing.content_keys import hash_of
from mllm.data.left_out import LeftOut
from mllm.data.pairs import names_of_sides
from mllm.errors import MediaError, OptionError, TrainingError
from mllm.inference.generation import eval_mode
from mllm.models.parts import freeze_unused
from mllm.models.supervised import attach_supervised_forward, detach_supervised_forward
from mllm.training.batching import collator_of
from mllm.training.feature_cache.media import (
    Content,
    contents_of,
    find_media,
    manifest_path,
    read_manifest,
    write_manifest,
)
from mllm.training.preference import OURS, by_side, with_sides, without_adapters
from mllm.training.preference_options import PreferenceArguments
from mllm.training.programs import Screen, StartingPoint
from mllm.training.reference import KnownReference, ReferenceLogProbs
from mllm.training.reference_key import hash_model, reference_ingredients
from mllm.training.reference_model import load_reference, reference_directory
from mllm.training.reference_pieces import Piece, describe, read_pieces, write_piece
from mllm.training.sharding import is_zero3, settle_dtype, whole_models

DEFAULT_CACHE = "reference_log_probs"
PAIRS_OF_A_PIECE = 256
"""What a kill may cost."""


@dataclass
class Pass:
    """What there is to be asked about some pairs.

    Args:
        directory: Where the answers are kept; its name is their key.
        examples: The pairs.
        collate: Makes padded batches of them.
        pieces: Which of the examples each piece holds, by their place.
        found: Pieces that were there before.
        computed: Those that this rank has computed.
        left_out: Pairs that it could not read.
    """

    directory: Path
    examples: Examples
    collate: LeavingOut
    pieces: list[np.ndarray]
    found: dict[int, Piece]
    computed: dict[int, Piece] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def missing(self) -> list[int]:
        """The numbers of the pieces that were not there."""
        return [number for number in range(len(self.pieces)) if number not in self.found]

    @property
    def num_missing(self) -> int:
        """Pairs in them."""
        return sum(len(self.pieces[number]) for number in self.missing)


def known_reference(
    args: PreferenceArguments,
    start: StartingPoint,
    model: nn.Module,
    *,
    features: Features | None,
    record: dict[str, Any],
    screen: Screen,
) -> KnownReference | None:
    """What the reference says of all pairs, where `precompute_ref_log_probs` asks for it. Called by all ranks.

    Args:
        args: The run's options.
        start: What it starts from: the pairs, and the model that is the reference if there is no other.
        model: With its modes applied, not yet given to a trainer; none of its weights is changed.
        features: Of the media of the pairs that are trained on, see `mllm.training.feature_cache`.
        record: Of the run; it has the hash of the model that it starts from.
        screen: Told how much there is to do, and how far it is.

    Raises:
        OptionError: The reference is of another architecture, or does not fit on a device.
        MediaError: Media are bad, where their source has `on_bad: error`, or too many.
        CheckpointError: There is no model at `reference`, or what was kept is damaged.
        TrainingError: The reference gives what is no number.
    """
    if not args.precompute_ref_log_probs:
        return None
    weights = {"files": record["model"]["sha256"]}
    if args.reference is not None:
        weights = hash_model(reference_directory(args, start.base))
    passes = []
    for examples, known in ((start.examples, features), (start.validation, None)):
        if examples is not None:
            texts = PaddingCollator(start.processor, source_of=examples.rows.source_number, features=known)
            collate = LeavingOut(collator_of(args, texts, model))
            passes.append(_planned(args, weights, examples, collate, screen))
    if any(one.missing for one in passes):
        with _asked(args, start.base, model) as reference:
            for one in passes:
                _ask(one, reference, args, screen)
    return KnownReference(*[_gathered(one) for one in passes])


def _planned(
    args: PreferenceArguments, weights: dict[str, Any], examples: Examples, collate: LeavingOut, screen: Screen
) -> Pass:
    """What there is to be asked. One rank looks for what was kept: another may see what is written meanwhile."""
    cache = Path(args.output_dir, args.reference_cache or DEFAULT_CACHE)
    contents = _read_contents(cache, examples, screen)
    ingredients = reference_ingredients(args, weights=weights, examples=examples, contents=contents)
    directory = cache / hash_of(ingredients)[:32]
    describe(directory, ingredients)
    longest_first = np.argsort(-examples.lengths, kind="stable")
    pieces = [longest_first[at : at + PAIRS_OF_A_PIECE] for at in range(0, len(examples), PAIRS_OF_A_PIECE)]
    found = read_pieces(directory, len(pieces)) if PartialState().is_main_process else {}
    (found,) = broadcast_object_list([found])
    planned = Pass(directory, examples, collate, pieces, found)
    screen.say(f"reference: {planned.num_missing:,} of {len(examples):,} pairs to be shown to it ({directory})")
    return planned


def _read_contents(cache: Path, examples: Examples, screen: Screen) -> list[Content | MediaError]:
    """What all media hold, of which each rank reads a share: the same name may stand for another picture today."""
    media = find_media(examples, progress=screen.progress("looking for media", len(examples)))
    path, state = manifest_path(cache, examples), PartialState()
    start, end = (len(media.items) * (state.process_index + more) // state.num_processes for more in (0, 1))
    bar = screen.progress("reading media", end - start)
    contents = gather_object(contents_of(media.items[start:end], read_manifest(path), progress=bar))
    if state.is_main_process:
        write_manifest(path, media.items, contents)
    return contents


@contextmanager
def _asked(args: PreferenceArguments, base: Path, model: nn.Module) -> Iterator[nn.Module]:
    """The reference, whole, since each rank asks it as often as it has pairs.

    It is the model itself, before its first step and without its adapters, unless that is sharded; else one that is
    let go afterwards.

    Raises:
        OptionError: It is of another architecture, or does not fit on a device.
    """
    is_itself = args.reference is None and not is_zero3(args)
    try:
        reference = model if is_itself else _loaded(args, base, model)
        if any(parameter.device.type != args.device.type for parameter in reference.parameters()):
            reference.to(args.device)
        attach_supervised_forward(reference)
        with eval_mode(reference), without_adapters(reference), torch.no_grad(), _autocast(args):
            yield reference
    except torch.OutOfMemoryError as error:
        raise OptionError(
            f"precompute_ref_log_probs: no memory left ({str(error).splitlines()[0]:.200})",
            expected="room for the whole reference on each device, also where the policy is sharded",
            do="lower `per_device_eval_batch_size`; or let a run on larger devices compute them, and name where they "
            "lie in `reference_cache`; or remove `precompute_ref_log_probs`",
        ) from error
    finally:
        if is_itself:
            freeze_unused(model)  # PEFT opens them when it puts the adapters on again
            detach_supervised_forward(model)  # the trainer's own waits for other ranks


def _loaded(args: PreferenceArguments, base: Path, model: nn.Module) -> nn.Module:
    with whole_models(args):
        reference = load_reference(args, base, model)
    settle_dtype(reference, args)
    return reference


def _autocast(args: PreferenceArguments) -> torch.autocast:
    """As accelerate has it; DeepSpeed has none, and casts the weights."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    is_mixed = (args.bf16 or args.fp16) and args.deepspeed_plugin is None
    return torch.autocast(args.device.type, dtype=dtype, enabled=is_mixed)


def _ask(one: Pass, reference: nn.Module, args: PreferenceArguments, screen: Screen) -> None:
    """Compute this rank's share of the missing pieces; each is on the disk as soon as it is known."""
    state, size = PartialState(), args.per_device_eval_batch_size
    own = {number: one.pieces[number] for number in one.missing[state.process_index :: state.num_processes]}
    batches = {
        number: [piece[at : at + size].tolist() for at in range(0, len(piece), size)] for number, piece in own.items()
    }
    loader = DataLoader(
        one.examples,
        batch_sampler=[batch for number in own for batch in batches[number]],
        collate_fn=one.collate,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator(),  # its own: training shall draw the same numbers, asked beforehand or not
    )
    collated, bar = iter(loader), screen.progress("asking the reference", sum(map(len, own.values())))
    for number in own:
        answers = []
        for batch in batches[number]:
            found = next(collated)
            one.left_out += found.left_out
            answers.append(_answer(reference, found, one.examples, args))
            bar(len(batch))
        one.computed[number] = Piece(*map(torch.cat, zip(*answers, strict=True)))
        write_piece(one.directory, number, one.computed[number])


def _answer(reference: nn.Module, collated: Collated, examples: Examples, args: PreferenceArguments) -> Piece:
    """What the reference says of a batch.

    Raises:
        TrainingError: It is no number.
    """
    batch = with_sides(collated.batch, names_of_sides(args.sides), asks_own_tokens=args.released_log_probs)
    batch = send_to_device(batch, args.device)
    taken = {name: value for name, value in batch.items() if name not in OURS}
    log_probs = reference(**taken, returns_log_probs=True, use_cache=False).log_probs
    values = by_side(log_probs, batch).float().cpu()
    wrong = (~values.isfinite()).any(-1).nonzero().flatten().tolist()
    if wrong:
        row = examples.rows[collated.positions[wrong[0]]]
        raise TrainingError(
            f"{row.name}: the reference's log-probabilities are {values[wrong[0]].tolist()}",
            expected="numbers",
            do="look at the reference; float16 overflows where bfloat16 does not",
        )
    return Piece(torch.tensor(collated.positions, dtype=torch.long), values)


def _gathered(one: Pass) -> ReferenceLogProbs:
    """All answers, of all ranks. Pairs that cannot be read are listed, or raise, now; they are counted when due."""
    pieces = dict(one.found)
    for computed in gather_object([one.computed]):
        pieces |= computed
    account = one.examples.account
    before = Counter(account.counts), Counter(account.by_source)
    for left_out in gather_object(one.left_out):
        account.add(left_out)
    account.counts, account.by_source = before
    ordered = [pieces[number] for number in range(len(one.pieces))]
    positions, values = map(torch.cat, zip(*ordered, strict=True))
    return ReferenceLogProbs(positions.tolist(), values)
