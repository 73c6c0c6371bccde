"""The fill: encode what a cache does not hold yet, while data workers decode what comes next."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mllm.data.schema import MediaItem
from mllm.errors import MediaError, MllmError, OptionError
from mllm.processing import MllmProcessor
from mllm.processing.files import media_name
from mllm.processing.images import decode_image
from mllm.shapes import Float, Pixels, Tensor
from mllm.training.feature_cache.media import read_medium
from mllm.training.feature_cache.store import ShardWriter

BATCH = 32
"""Media encoded at once."""

Encode = Callable[[Pixels], Float[Tensor, "N P D_encoder"]]


@dataclass(frozen=True)
class Wanted:
    """A medium whose features are not there yet.

    Args:
        number: Of the item in `RunMedia`.
        item: The medium.
        sha256: Of the bytes that its key was made of.
        key: Of its features.
    """

    number: int
    item: MediaItem
    sha256: bytes
    key: bytes


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
    """Encode media and write their features; returns those that cannot be decoded.

    Args:
        wanted: What to encode.
        writer: Where to write.
        encode: Pixels to features.
        processor: Decides the pixels.
        num_workers: Processes that decode.
        batch_size: Media encoded at once.
        progress: Called with how many media are done.

    Raises:
        OptionError: A file has changed since its key was made.
    """
    batches: Iterable[DecodedMedia] = DataLoader(
        _Media(wanted),
        batch_size=batch_size,
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
        if batch.pixel_values is not None:
            writer.add(batch.keys, encode(batch.pixel_values))
        if progress:
            progress(len(batch.keys) + len(batch.problems))
    return problems


@dataclass(frozen=True)
class DecodedMedia:
    """A batch on its way from a worker.

    Args:
        keys: Of the media that could be decoded.
        pixel_values: Theirs; None where there are none.
        problems: What is wrong with the others.
    """

    keys: list[bytes]
    pixel_values: Pixels | None
    problems: Problems


class _Media(Dataset[tuple[Wanted, Any]]):
    """Each wanted medium, and its decoded image or what is wrong with it: workers must not raise."""

    def __init__(self, wanted: Sequence[Wanted]):
        self.wanted = wanted

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> tuple[Wanted, Any]:
        wanted = self.wanted[index]
        try:
            data = read_medium(wanted.item)
            if hashlib.sha256(data).digest() != wanted.sha256:
                return wanted, _changed(wanted.item)
        except MediaError as error:
            return wanted, error
        try:
            return wanted, decode_image(data)
        except MediaError as error:
            return wanted, _by_name(error, wanted.item, data)


class _Preprocess:
    """Decoded images to pixels, in the worker, too."""

    def __init__(self, processor: MllmProcessor):
        self.processor = processor

    def __call__(self, decoded: Sequence[tuple[Wanted, Any]]) -> DecodedMedia:
        good = [(wanted, image) for wanted, image in decoded if not isinstance(image, MllmError)]
        problems = {wanted.number: error for wanted, error in decoded if isinstance(error, MllmError)}
        images = [image for _, image in good]
        pixels = self.processor.encode_images(images) if images else None
        return DecodedMedia([wanted.key for wanted, _ in good], pixels, problems)


def _by_name(error: MediaError, item: MediaItem, data: bytes) -> MediaError:
    """The error as it would be had the decoder been given the file, and not its bytes."""
    if item.path is None:
        return error
    found = error.found.removeprefix(media_name(item.kind, data, ""))
    return MediaError(media_name(item.kind, item.path, "") + found, expected=error.expected, do=error.do)


def _changed(item: MediaItem) -> OptionError:
    return OptionError(
        f"feature cache: {item.path or item.blob} has changed since the run began",
        expected="data that nobody writes while they are read",
        do="start the run again when whoever changes it is done",
    )
