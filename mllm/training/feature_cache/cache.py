"""The feature cache of a run: filled before its first step, read in place of media from then on."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
from mllm.errors import MediaError, MllmError, OptionError, RowError
from mllm.models import MllmForConditionalGeneration, MllmModel
from mllm.models.modeling import MllmTower
from mllm.models.parts import PartOptions
from mllm.processing import MllmProcessor
from mllm.training.feature_cache.encoding import encoder_of, ready
from mllm.training.feature_cache.features import CachedFeatures, Places, of_row
from mllm.training.feature_cache.fill import BATCH, Encode, Problems, Wanted, fill
from mllm.training.feature_cache.key import feature_space, view_names
from mllm.training.feature_cache.media import (
    Content,
    RunMedia,
    contents_of,
    find_media,
    manifest_path,
    read_manifest,
    write_manifest,
)
from mllm.training.feature_cache.room import Missing, check_room, estimate_fill
from mllm.training.feature_cache.store import FeatureStore, ShardWriter

VISIBLE_AFTER = (0, 1, 2, 4, 8, 16)
"""Seconds to wait, again and again, for what other ranks have written."""

Progress = Callable[[str, int | None], Callable[..., Any]]
"""Called with what is done and how often; gives what to call each time, or with how many times."""

Keys = list[tuple[bytes, ...]]
"""Of each medium of a run the keys of its views; none for what could not be read."""


@dataclass
class Source:
    """One kind of media, and where its features come from.

    Args:
        tower: The one whose encoder sees them.
        encode: Calls it.
        store: Where they lie.
        wanted: What is not there yet.
    """

    tower: MllmTower
    encode: Encode
    store: FeatureStore
    wanted: list[Wanted] = field(default_factory=list)


def check_cacheable(model: nn.Module, parts: Mapping[str, PartOptions]) -> MllmModel:
    """The model whose encoders' features can be cached.

    Raises:
        OptionError: It is not ours, or one of its encoders is trained.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(plain, MllmForConditionalGeneration):
        raise OptionError(
            f"feature_cache, and the model is a {type(plain).__name__}",
            expected="a model that `assemble` made",
            do="leave `feature_cache` out",
        )
    for kind, tower in plain.model.towers.items():
        mode = parts.get(f"{kind}.encoder", PartOptions()).mode
        if tower.encoder is not None and mode != "frozen":
            raise OptionError(
                f"feature_cache, and parts: {kind}.encoder = {mode}",
                expected="a frozen encoder: features of one that is trained are others at every step",
                do=f"set `{kind}.encoder: frozen`, or leave `feature_cache` out",
            )
    return plain.model


def cache_features(
    directory: Path,
    examples: Examples,
    model: MllmModel,
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
        model: Its encoders are frozen.
        processor: Makes the encoders' inputs.
        device: Where to encode.
        autocast: The type of mixed precision that the encoders run in during training, if they do.
        num_workers: Processes that decode.
        batch_size: Views encoded at once; the towers' `encoder_chunk`, or else 32.
        say: Told what will be written.
        progress: Shows how far it is.

    Raises:
        OptionError: The disk has no room, or the ranks see different directories.
        MediaError: Media are bad, where their source has `on_bad: error`, or too many.
        CheckpointError: A file of the cache is damaged.
    """
    media = find_media(examples, progress=progress("looking for media", len(examples)))
    contents = _read_contents(directory, examples, media, progress)
    sources = {
        kind: _source(kind, model, processor, directory, device=device, autocast=autocast) for kind in model.towers
    }
    keys = _keys(media, contents, sources, processor)
    _find_missing(media, contents, keys, sources)
    missing = [
        Missing(one.store.space, len(one.wanted), sum(len(item.missing) for item in one.wanted))
        for one in sources.values()
    ]
    estimate = estimate_fill(directory, missing, num_media=len(media.items))
    say(f"feature cache {directory}: {estimate}")
    check_room(directory, estimate)
    if PartialState().is_main_process:
        write_manifest(manifest_path(directory, examples), media.items, contents)
    bar = progress("encoding media", sum(len(_share(one.wanted)) for one in sources.values()))
    problems: Problems = {}
    for source in sources.values():
        with ready(source.tower), ShardWriter(directory, source.store.space) as writer:
            problems |= fill(
                _share(source.wanted),
                writer,
                encode=source.encode,
                processor=processor,
                num_workers=num_workers,
                batch_size=batch_size or source.tower.encoder_chunk or BATCH,
                progress=bar,
            )
    problems = _spread(problems)
    problems |= {number: found for number, found in enumerate(contents) if isinstance(found, MllmError)}
    places = _places(directory, media, keys, sources, problems)  # behind `_spread`, which waits for all ranks
    _account(examples, media, problems)
    rules = {kind: processor.rule(kind) for kind in sources}
    return CachedFeatures({kind: one.store for kind, one in sources.items()}, rules, media, places)


def _read_contents(
    directory: Path, examples: Examples, media: RunMedia, progress: Progress
) -> list[Content | MediaError]:
    """What all media hold; each rank reads a share of the files that are not known."""
    known = read_manifest(manifest_path(directory, examples))
    own = media.items[_part(len(media.items))]
    return gather_object(contents_of(own, known, progress=progress("reading media", len(own))))


def _source(
    kind: str,
    model: MllmModel,
    processor: MllmProcessor,
    directory: Path,
    *,
    device: torch.device | str,
    autocast: torch.dtype | None,
) -> Source:
    """The encoder of a kind of media, and the store of what it gives for one view of zeros, and so for all."""
    tower = model.towers[kind]
    tower = tower if tower.encoder is not None else model.image_tower
    with ready(tower):
        encode = encoder_of(tower, device=device, autocast=autocast)
        sample = encode(tower.native_zeros(), None)
        space = feature_space(kind, tower, processor, features=sample, autocast=autocast)
    return Source(tower, encode, FeatureStore(directory, space))


def _keys(
    media: RunMedia,
    contents: Sequence[Content | MediaError],
    sources: Mapping[str, Source],
    processor: MllmProcessor,
) -> Keys:
    """Of every view of every medium; none of one that is too large, whose row says so when it is due."""
    keys: Keys = []
    for item, content in zip(media.items, contents, strict=True):
        names: list[str] = []
        if isinstance(content, Content):
            with suppress(RowError):
                names = view_names(item, processor)
        space = sources[item.kind].store.space
        keys.append(tuple(space.key(content.sha256, item, name) for name in names) if names else ())
    return keys


def _find_missing(
    media: RunMedia, contents: Sequence[Content | MediaError], keys: Keys, sources: Mapping[str, Source]
) -> None:
    """What the caches do not hold, each view once. One rank looks: another may see what is written meanwhile."""
    found: dict[str, list[Wanted]] = {kind: [] for kind in sources}
    seen: set[bytes] = set()
    for number, own in enumerate(keys if PartialState().is_main_process else ()):
        item, content = media.items[number], contents[number]
        known = sources[item.kind].store.places
        missing = []
        for view, key in enumerate(own):
            if key not in known and key not in seen:
                seen.add(key)
                missing.append(view)
        if missing and isinstance(content, Content):
            found[item.kind].append(Wanted(number, item, content.sha256, own, tuple(missing)))
    (found,) = broadcast_object_list([found])
    for kind, source in sources.items():
        source.wanted = found[kind]


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


def _places(directory: Path, media: RunMedia, keys: Keys, sources: Mapping[str, Source], problems: Problems) -> Places:
    """Where the features of each item lie; items of the same content share places, or a problem."""
    bad = {key: number for number in problems for key in keys[number]}
    _see_all(media, keys, sources, bad)
    views, starts = [], [0]
    for number, (item, own) in enumerate(zip(media.items, keys, strict=True)):
        known = sources[item.kind].store.places
        if lost := [key for key in own if key not in known]:
            if lost[0] not in bad:
                raise OptionError(
                    f"feature_cache: {directory} does not hold the features of {item.path}",
                    expected="one directory that all ranks see, from which nobody deletes while a run goes on",
                    do="name a directory on a disk that all machines share",
                )
            problems[number] = problems[bad[lost[0]]]
        views += [known[key] for key in own] if not lost else []
        starts.append(len(views))
    return Places(np.array(views, np.int64).reshape(-1, 2), np.array(starts, np.int64), problems)


def _see_all(media: RunMedia, keys: Keys, sources: Mapping[str, Source], bad: Mapping[bytes, int]) -> None:
    """Read the lists of what all ranks have written; a network disk may show a new file some seconds late."""
    for kind, source in sources.items():
        wanted = {key for item, own in zip(media.items, keys, strict=True) if item.kind == kind for key in own}
        for seconds in VISIBLE_AFTER:
            time.sleep(seconds)
            source.store.refresh()
            if wanted - bad.keys() <= source.store.places.keys():
                break


def _account(examples: Examples, media: RunMedia, problems: Problems) -> None:
    """List the rows with bad media, or raise, now. They are counted when they are due, as in a run without a cache."""
    account, before = examples.account, Counter(examples.account.counts)
    for position in examples.used.tolist() if problems else ():
        row = examples.rows[position]
        bad = [
            number
            for number in media.numbers_of(position, len(examples.media_of(position))).tolist()
            if number in problems
        ]
        if bad:
            item, error = media.items[bad[0]], of_row(problems[bad[0]], row.name)
            file = str(item.path or item.blob)
            account.add(LeftOut(position, BAD, Bad(row.id, row.where, file, error.found), error))
    account.counts = before
