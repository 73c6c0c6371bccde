"""The feature cache of a run: filled before its first step, read in place of media from then on."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch import nn

from mllm.data.examples import Examples
from mllm.data.left_out import BAD, LeftOut
from mllm.data.quarantine import Bad
from mllm.errors import MediaError, MllmError, OptionError
from mllm.models import MllmForConditionalGeneration
from mllm.models.modeling import MllmTower
from mllm.models.parts import PartOptions
from mllm.processing import MllmProcessor
from mllm.shapes import Float, Pixels, Tensor
from mllm.training.feature_cache.features import CachedFeatures, of_row
from mllm.training.feature_cache.fill import BATCH, Problems, Wanted, fill
from mllm.training.feature_cache.key import image_space
from mllm.training.feature_cache.media import (
    Content,
    RunMedia,
    contents_of,
    find_media,
    manifest_path,
    read_manifest,
    write_manifest,
)
from mllm.training.feature_cache.room import check_room, estimate_fill
from mllm.training.feature_cache.store import FeatureStore, ShardWriter

VISIBLE_AFTER = (0, 1, 2, 4, 8, 16)
"""Seconds to wait, again and again, for what other ranks have written."""

Progress = Callable[[str, int | None], Callable[..., Any]]
"""Called with what is done and how often; gives what to call each time, or with how many times."""


def check_cacheable(model: nn.Module, parts: Mapping[str, PartOptions]) -> MllmTower:
    """The tower whose features can be cached.

    Raises:
        OptionError: The model has none, or its encoder is trained.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(plain, MllmForConditionalGeneration) or "image" not in plain.model.towers:
        raise OptionError(
            f"feature_cache, and the model is a {type(plain).__name__} without an image tower of ours",
            expected="a model that `assemble` made, with an image encoder",
            do="leave `feature_cache` out",
        )
    mode = parts.get("image.encoder", PartOptions()).mode
    if mode != "frozen":
        raise OptionError(
            f"feature_cache, and parts: image.encoder = {mode}",
            expected="a frozen encoder: features of one that is trained are others at every step",
            do="set `image.encoder: frozen`, or leave `feature_cache` out",
        )
    return plain.model.image_tower


def cache_features(
    directory: Path,
    examples: Examples,
    tower: MllmTower,
    processor: MllmProcessor,
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    num_workers: int = 0,
    batch_size: int | None = None,
    say: Callable[[str], Any],
    progress: Progress,
) -> CachedFeatures:
    """Have the features of all media of a run in a cache, each rank filling its share. Called by all ranks.

    Args:
        directory: Of the cache, the same for all ranks; other runs may use it at the same time.
        examples: The rows. Those with media that cannot be decoded are accounted as in training.
        tower: Its encoder is frozen.
        processor: Decides the pixels.
        device: Where to encode.
        autocast: The type of mixed precision that the encoder runs in during training, if it does.
        num_workers: Processes that decode.
        batch_size: Media encoded at once; the tower's `encoder_chunk`, or else 32.
        say: Told what will be written.
        progress: Shows how far it is.

    Raises:
        OptionError: The disk has no room, or the ranks see different directories.
        MediaError: Media are bad, where their source has `on_bad: error`, or too many.
        CheckpointError: A file of the cache is damaged.
    """
    batch_size = batch_size or tower.encoder_chunk or BATCH
    media = find_media(examples, progress=progress("looking for media", len(examples)))
    contents = _read_contents(directory, examples, media, progress)
    with _whole(tower.encoder), _alone(tower):
        encode = _encoder(tower, device=device, autocast=autocast)
        sample = encode(tower.native_zeros())
        space = image_space(tower.encoder, tower.config, processor, features=sample, autocast=autocast)
        store = FeatureStore(directory, space)
        wanted = _missing(media, contents, store)
        estimate = estimate_fill(directory, space, num_media=len(media.items), num_missing=len(wanted))
        say(f"feature cache {directory}: {estimate}")
        check_room(directory, estimate)
        if PartialState().is_main_process:
            write_manifest(manifest_path(directory, examples), media.items, contents)
        with ShardWriter(directory, space) as writer:
            problems = fill(
                _share(wanted),
                writer,
                encode=encode,
                processor=processor,
                num_workers=num_workers,
                batch_size=batch_size,
                progress=progress("encoding media", len(_share(wanted))),
            )
    problems = _spread(problems)
    problems |= {number: found for number, found in enumerate(contents) if isinstance(found, MllmError)}
    places = _places(directory, media, contents, store, problems)  # behind `_spread`, which waits for all ranks
    _account(examples, media, problems)
    return CachedFeatures(store, media, places, problems)


def _read_contents(
    directory: Path, examples: Examples, media: RunMedia, progress: Progress
) -> list[Content | MediaError]:
    """What all media hold; each rank reads a share of the files that are not known."""
    known = read_manifest(manifest_path(directory, examples))
    own = media.items[_part(len(media.items))]
    return gather_object(contents_of(own, known, progress=progress("reading media", len(own))))


def _encoder(
    tower: MllmTower, *, device: torch.device | str, autocast: torch.dtype | None
) -> Callable[[Pixels], Float[Tensor, "N P D_encoder"]]:
    """Pixels to what the connector would get in training."""
    device = torch.device(device)
    tower.encoder.eval()
    if not _is_sharded(tower.encoder):
        tower.encoder.to(device)

    def encode(pixels: Pixels) -> Float[Tensor, "N P D_encoder"]:
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return tower.select_features(tower.encode(pixels.to(device)))

    return encode


@contextmanager
def _alone(tower: MllmTower) -> Iterator[None]:
    """Let the encoder be called without asking the other ranks how often they call it."""
    chunk, tower.encoder_chunk = tower.encoder_chunk, None
    try:
        yield
    finally:
        tower.encoder_chunk = chunk


def _is_sharded(module: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _whole(module: nn.Module) -> AbstractContextManager[Any]:
    """The weights of a module that ZeRO-3 may have dealt out among the ranks, as a whole on each."""
    if not _is_sharded(module):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()))


def _missing(media: RunMedia, contents: Sequence[Content | MediaError], store: FeatureStore) -> list[Wanted]:
    """What the cache does not hold, each content once. One rank looks: another may see what is written meanwhile."""
    found: dict[bytes, int] = {}
    if PartialState().is_main_process:
        for number, content in enumerate(contents):
            if isinstance(content, Content):
                key = store.space.key(content.sha256, media.items[number])
                if key not in store.places:
                    found.setdefault(key, number)
    (found,) = broadcast_object_list([found])
    wanted = []
    for key, number in found.items():
        content = contents[number]
        assert isinstance(content, Content)
        wanted.append(Wanted(number, media.items[number], content.sha256, key))
    return wanted


def _part(size: int) -> slice:
    """This rank's part of so many things: neighbours, which often lie in one file."""
    state = PartialState()
    rank, world_size = state.process_index, state.num_processes
    return slice(size * rank // world_size, size * (rank + 1) // world_size)


def _share(wanted: list[Wanted]) -> list[Wanted]:
    return wanted[_part(len(wanted))]


def _spread(problems: Problems) -> Problems:
    """The problems that all ranks have found; waits for all of them."""
    gathered = gather_object(list(problems.items()))
    PartialState().wait_for_everyone()
    return dict(gathered)


def _places(
    directory: Path,
    media: RunMedia,
    contents: Sequence[Content | MediaError],
    store: FeatureStore,
    problems: Problems,
) -> np.ndarray:
    """Where the features of each item lie; items of the same content share a place, or a problem."""
    places = np.full((len(media.items), 2), -1, np.int64)
    keys = [
        store.space.key(content.sha256, item) if isinstance(content, Content) else b""
        for item, content in zip(media.items, contents, strict=True)
    ]
    bad = {keys[number]: number for number in problems if keys[number]}
    _see_all(store, {key for key in keys if key and key not in bad})
    for number, key in enumerate(keys):
        if not key:
            continue
        if key in bad:
            problems[number] = problems[bad[key]]
        elif key in store.places:
            places[number] = store.places[key]
        else:
            raise OptionError(
                f"feature_cache: {directory} does not hold the features of {media.items[number].path}",
                expected="one directory that all ranks see, from which nobody deletes while a run goes on",
                do="name a directory on a disk that all machines share",
            )
    return places


def _see_all(store: FeatureStore, keys: set[bytes]) -> None:
    """Read the lists of what all ranks have written; a network disk may show a new file some seconds late."""
    for seconds in VISIBLE_AFTER:
        time.sleep(seconds)
        store.refresh()
        if keys <= store.places.keys():
            return


def _account(examples: Examples, media: RunMedia, problems: Problems) -> None:
    """List the rows with bad media, or raise, now. They are counted when they are due, as in a run without a cache."""
    account, before = examples.account, Counter(examples.account.counts)
    for position in examples.used.tolist() if problems else ():
        row = examples.rows[position]
        bad = [number for number in media.numbers_of(position, len(row.media)).tolist() if number in problems]
        if bad:
            item, error = media.items[bad[0]], of_row(problems[bad[0]], row.name)
            file = str(item.path or item.blob)
            account.add(LeftOut(position, BAD, Bad(row.id, row.where, file, error.found), error))
    account.counts = before
