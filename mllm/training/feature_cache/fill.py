"""The fill: encode what a cache does not hold yet, while data workers decode what comes next."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mllm.data.collate import decode_item
from mllm.data.schema import MediaItem
from mllm.errors import MediaError, MllmError, OptionError
from mllm.models.media import VALUES
from mllm.processing import MllmProcessor
from mllm.processing.files import media_name
from mllm.processing.media import MediaInput
from mllm.shapes import EncoderFeatures, MediaValues, Tensor
from mllm.training.feature_cache.media import open_medium, sha256_of
from mllm.training.feature_cache.store import ShardWriter

BATCH = 32
"""Views encoded at once."""

Encode = Callable[[MediaValues, Tensor | None], EncoderFeatures]
"""From views, and what is said of the sizes of their items, to features."""


@dataclass(frozen=True)
class Wanted:
    """A medium of which some features are not there yet.

    Args:
        number: Of the item in `RunMedia`.
        item: The medium.
        sha256: Of the bytes that its keys were made of.
        keys: Of the features of its views, in order.
        missing: Numbers of the views whose features are to be written.
    """

    number: int
    item: MediaItem
    sha256: bytes
    keys: tuple[bytes, ...]
    missing: tuple[int, ...]


Problems = dict[int, MllmError]
"""What is wrong with a medium, by its number."""


def fill(
    wanted: Sequence[Wanted],
    writer: ShardWriter,
    *,
    encode: Encode,
    processor: MllmProcessor,
    num_workers: int = 0,
    batch_size: int = BATCH,
    progress: Callable[..., Any] | None = None,
) -> Problems:
    """Encode media of one kind and write their features; returns those that cannot be decoded.

    Args:
        wanted: What to encode.
        writer: Where to write.
        encode: Views to features.
        processor: Makes views of media.
        num_workers: Processes that decode.
        batch_size: Views encoded at once. Those of one sound are never parted, however many.
        progress: Called with how many media are done.

    Raises:
        OptionError: A file has changed since its key was made.
    """
    batches: Iterable[DecodedMedia] = DataLoader(
        _Media(wanted, processor),
        batch_sampler=groups([len(one.keys) for one in wanted], batch_size),
        collate_fn=_Preprocess(processor),
        num_workers=num_workers,
        generator=torch.Generator(),  # its own: the global one shall stand where it stands in a run without a cache
    )
    problems: Problems = {}
    for batch in batches:
        for problem in batch.problems.values():
            if not isinstance(problem, MediaError):
                raise problem
        problems |= batch.problems
        if batch.values is not None:
            calls = [batch.values] if batch.is_whole else batch.values.split(batch_size)
            features = torch.cat([encode(values, batch.sizes).cpu() for values in calls])
            writer.add(list(batch.keys), features[list(batch.places)])
        if progress:
            progress(batch.num_media)
    return problems


def groups(counts: Sequence[int], most: int) -> list[list[int]]:
    """Neighbours taken together until they have so many views.

    Example: counts of 1, 1, 8 and 1, and at most 2: [0, 1], [2], [3].
    """
    found: list[list[int]] = []
    views = most
    for number, count in enumerate(counts):
        if views + count > most:
            found.append([])
            views = 0
        found[-1].append(number)
        views += count
    return found


@dataclass(frozen=True)
class DecodedMedia:
    """A batch on its way from a worker.

    Args:
        num_media: How many were to be decoded.
        problems: What is wrong with those that could not be.
        values: All views of the others; None where there are none.
        sizes: What the encoder is told of the sizes of the items.
        is_whole: Whether the views have to be encoded in one call, as the sizes are those of all of them.
        keys: Of the features that are to be written.
        places: Of these among the views.
    """

    num_media: int
    problems: Problems
    values: MediaValues | None = None
    sizes: Tensor | None = None
    is_whole: bool = False
    keys: tuple[bytes, ...] = ()
    places: tuple[int, ...] = ()


class _Media(Dataset[tuple[Wanted, Any]]):
    """Each wanted medium, and it decoded or what is wrong with it: workers must not raise."""

    def __init__(self, wanted: Sequence[Wanted], processor: MllmProcessor):
        self.wanted = wanted
        self.processor = processor

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> tuple[Wanted, Any]:
        wanted = self.wanted[index]
        source: Any = None
        try:
            source = open_medium(wanted.item)
            if sha256_of(wanted.item, source) != wanted.sha256:
                return wanted, _changed(wanted.item)
            return wanted, decode_item(wanted.item, source, self.processor, where="")
        except MediaError as error:
            return wanted, _by_name(error, wanted.item, source)


class _Preprocess:
    """Decoded media to views, in the worker, too."""

    def __init__(self, processor: MllmProcessor):
        self.processor = processor

    def __call__(self, decoded: Sequence[tuple[Wanted, Any]]) -> DecodedMedia:
        good = [(wanted, medium) for wanted, medium in decoded if isinstance(medium, MediaInput)]
        problems = {wanted.number: error for wanted, error in decoded if isinstance(error, MllmError)}
        if not good:
            return DecodedMedia(len(decoded), problems)
        kind = good[0][0].item.kind
        inputs = self.processor.encode_media([medium for _, medium in good])
        values = inputs[VALUES[kind]]
        keys, places, start = [], [], 0
        for wanted, _ in good:
            keys += [wanted.keys[number] for number in wanted.missing]
            places += [start + number for number in wanted.missing]
            start += len(wanted.keys)
        assert len(values) == start, f"{len(values)} views, and {start} were counted"
        is_audio = kind == "audio"
        sizes = inputs["audio_sizes"] if is_audio else None
        return DecodedMedia(len(decoded), problems, values, sizes, is_audio, tuple(keys), tuple(places))


def _by_name(error: MediaError, item: MediaItem, source: Any) -> MediaError:
    """The error as it would be had the decoder been given the file, and not its bytes."""
    found = error.found.removeprefix(": ")
    if item.path is not None and isinstance(source, bytes):
        found = media_name(item.kind, item.path, "") + found.removeprefix(media_name(item.kind, source, ""))
    return MediaError(found, expected=error.expected, do=error.do)


def _changed(item: MediaItem) -> OptionError:
    return OptionError(
        f"feature cache: {item.path or item.blob} has changed since the run began",
        expected="data that nobody writes while they are read",
        do="start the run again when whoever changes it is done",
    )
