"""Examples to one padded batch: decode the media, pad the text."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from mllm.data.blobs import read_media_bytes
from mllm.data.examples import Example
from mllm.data.labels import IGNORED
from mllm.data.left_out import BAD, LeftOut
from mllm.data.quarantine import Bad
from mllm.data.schema import MediaItem
from mllm.errors import MediaError
from mllm.processing import MllmProcessor
from mllm.processing.images import decode_image
from mllm.shapes import Tensor


class PaddingCollator:
    """Make a padded batch of a list of examples. Packing will be a second collator with the same input.

    Args:
        processor: Decides the pixels, and the padding id.
    """

    def __init__(self, processor: MllmProcessor):
        self.processor = processor
        tokenizer = processor.tokenizer
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Collate.

        Returns:
            `input_ids`, `labels` (-100 on all that is not learned) and `attention_mask` (from lengths, so that a
            padding id inside a text stays visible), all [B, T] and padded on the right; `pixel_values` [N, C, H, W]
            where there are images; `loss_weights` [B, T] where some label weighs other than 1.

            No examples give two padding tokens with nothing to learn: an empty micro-batch of weight 0.

        Raises:
            MediaError: An image turns out to be damaged behind its header.
        """
        if not examples:
            ids = torch.full((1, 2), self.pad_id)
            return {"input_ids": ids, "labels": torch.full((1, 2), IGNORED), "attention_mask": torch.ones_like(ids)}
        lengths = [len(example.input_ids) for example in examples]
        batch: dict[str, Any] = {
            "input_ids": _pad([example.input_ids for example in examples], self.pad_id, torch.long),
            "labels": _pad([example.labels for example in examples], IGNORED, torch.long),
            "attention_mask": _pad([[1] * length for length in lengths], 0, torch.long),
        }
        if any(example.loss_weights is not None for example in examples):
            weights = [
                [1.0] * length if example.loss_weights is None else example.loss_weights
                for example, length in zip(examples, lengths, strict=True)
            ]
            batch["loss_weights"] = _pad(weights, 0.0, torch.float32)
        images = [image for example in examples for image in _images(example)]
        if images:
            batch["pixel_values"] = self.processor.encode_images(images)
        return batch


class Collated(NamedTuple):
    """A batch, and the rows that were left out of it."""

    batch: dict[str, Any]
    left_out: tuple[LeftOut, ...]


class LeavingOut:
    """Collate what can be collated, and say what was left out: an exception must not come from a data worker.

    It would reach the main process as a text in another exception, the message buried in a traceback. There
    `mllm.data.left_out.usable_batches` counts, lists or raises.

    Args:
        collate: Makes a batch of examples.
    """

    def __init__(self, collate: PaddingCollator):
        self.collate = collate

    def __call__(self, rows: Sequence[Example | LeftOut]) -> Collated:
        """The batch, without rows that cannot be trained on and without those whose media are damaged."""
        examples = [row for row in rows if isinstance(row, Example)]
        left_out = [row for row in rows if isinstance(row, LeftOut)]
        try:
            return Collated(self.collate(examples), tuple(left_out))
        except MediaError:
            damaged = {id(example): found for example in examples if (found := _damage(example)) is not None}
        left_out += damaged.values()
        return Collated(self.collate([one for one in examples if id(one) not in damaged]), tuple(left_out))


def decode_media(item: MediaItem, *, where: str) -> Image.Image:
    """The pixels of an image, wherever its bytes lie.

    Raises:
        MediaError: It is not there, or damaged.
    """
    return decode_image(read_media_bytes(item), where=where)


def _images(example: Example) -> Iterator[Image.Image]:
    """The images of a row, decoded as they are asked for."""
    for place, item in enumerate(example.row.media):
        source = read_media_bytes(item) if example.media is None else example.media[place]
        yield decode_image(source, where=example.row.name)


def _damage(example: Example) -> LeftOut | None:
    """What is wrong with the first of a row's media that cannot be decoded."""
    images = _images(example)
    for item in example.row.media:
        try:
            next(images)
        except MediaError as error:
            file = str(item.path or item.blob)
            return LeftOut(example.position, BAD, Bad(example.row.id, example.row.where, file, error.found), error)
    return None


def _pad(rows: Sequence[Any], value: int | float, dtype: torch.dtype) -> Tensor:
    """Stack sequences of unequal length, padded on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=dtype)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.as_tensor(values, dtype=dtype)
    return padded
