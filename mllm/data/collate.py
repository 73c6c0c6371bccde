"""Examples to one padded batch: decode the media, pad the text."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from mllm.data.examples import Example
from mllm.data.labels import IGNORED
from mllm.errors import MllmError
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
        images = [
            decode_image(item.path, where=example.row.name) for example in examples for item in example.row.media
        ]
        if images:
            batch["pixel_values"] = self.processor.encode_images(images)
        return batch


class ErrorsAsBatches:
    """Collate; in a data worker, hand an `MllmError` over in place of the batch.

    An exception raised in a worker reaches the main process as a text in another exception, and its message would be
    buried in a traceback. `raising_errors` raises it there as it was.
    """

    def __init__(self, collate: Callable[[Sequence[Example]], dict[str, Tensor]]):
        self.collate = collate

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor] | MllmError:
        """The batch, or what is wrong with it."""
        try:
            return self.collate(examples)
        except MllmError as error:
            if get_worker_info() is None:
                raise
            return error


def raising_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, one by one as they are asked for; an error among them is raised."""
    for batch in batches:
        if isinstance(batch, MllmError):
            raise batch
        yield batch


def _pad(rows: Sequence[Any], value: int | float, dtype: torch.dtype) -> Tensor:
    """Stack sequences of unequal length, padded on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=dtype)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.as_tensor(values, dtype=dtype)
    return padded
