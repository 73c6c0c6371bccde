"""Examples to one batch, padded or packed: decode the media, put the texts side by side."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from mllm.data.blobs import read_media_bytes
from mllm.data.examples import Example
from mllm.data.labels import IGNORED
from mllm.data.left_out import BAD, LeftOut
from mllm.data.quarantine import Bad
from mllm.data.schema import MediaItem
from mllm.errors import MediaError, MllmError
from mllm.processing import TrainingProcessor
from mllm.processing.audio import decode_audio
from mllm.processing.images import decode_image
from mllm.processing.media import MediaInput
from mllm.processing.video import decode_video
from mllm.shapes import Tensor

NUM_EMPTY = 2
"""Tokens of an empty micro-batch, of which none is learned."""


@runtime_checkable
class Features(Protocol):
    """Media as a frozen encoder saw them before, to be had without opening any (`mllm.training.feature_cache`)."""

    def of(self, example: Any) -> Iterator[Any]:
        """The features of a row's media, as they are asked for; a MediaError where one could not be decoded."""

    def batch(self, media: Sequence[Any]) -> dict[str, Tensor]:
        """The inputs of a batch that has these media, which may be none."""


@runtime_checkable
class Collator(Protocol):
    """Makes a batch of examples, whose media it can also be asked for one by one."""

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The batch."""

    def media_of(self, example: Any, row: int = 0) -> Iterator[Any]:
        """An example's media as the batch needs them; a MediaError where one cannot be had."""


class _Collator:
    """What both forms of a batch share: the media, and where the rows come from.

    Args:
        processor: Decides the pixels, and the padding id.
        source_of: From a row's position to the number of its source in the mixture; with it a batch has `sources`.
        features: With them a batch has `{kind}_features`, and no media are opened.
    """

    def __init__(
        self,
        processor: TrainingProcessor,
        *,
        source_of: Callable[[int], int] | None = None,
        features: Features | None = None,
    ):
        self.processor = processor
        self.source_of = source_of
        self.features = features
        tokenizer = processor.tokenizer
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate. No examples give two padding tokens with nothing to learn: an empty micro-batch of weight 0.

        Returns:
            The texts as the class says; where there are media, the processor's tensors for them, in order of
            appearance (`pixel_values` [N, C, H, W] of composed models), or in every batch of a run with cached
            features `image_features`, `audio_features` and `video_features` [views, L, D_encoder];
            `sources` [rows], the number of each row's source, where they were asked for.

        Raises:
            MediaError: An image turns out to be damaged behind its header.
        """
        media = [item for row, example in enumerate(examples) for item in self.media_of(example, row)]
        batch = self.texts(examples)
        if self.source_of is not None:
            batch["sources"] = torch.tensor([self.source_of(one.position) for one in examples], dtype=torch.long)
        if self.features is not None:
            batch |= self.features.batch(media)
        else:
            batch |= self.processor.encode_media(media)
        batch |= self.processor.encode_questions([example.row.messages for example in examples])
        return batch | self.processor.text_inputs(batch["input_ids"])

    def media_of(self, example: Example, row: int = 0) -> Iterator[Any]:
        """A row's media as the batch needs them, one after the other: decoded, or as features."""
        return _decoded(example, self.processor, row) if self.features is None else self.features.of(example)

    def texts(self, examples: Sequence[Example]) -> dict[str, Any]:
        raise NotImplementedError


class PaddingCollator(_Collator):
    """Make a padded batch of a list of examples.

    It has `input_ids`, `labels` (-100 on all that is not learned) and `attention_mask` (from lengths, so that a
    padding id inside a text stays visible), all [B, T] and padded on the right; `loss_weights` [B, T] where some label
    weighs other than 1.
    """

    def texts(self, examples: Sequence[Example]) -> dict[str, Any]:
        if not examples:
            ids = torch.full((1, NUM_EMPTY), self.pad_id)
            return {"input_ids": ids, "labels": torch.full_like(ids, IGNORED), "attention_mask": torch.ones_like(ids)}
        batch = {
            "input_ids": _pad([example.input_ids for example in examples], self.pad_id, torch.long),
            "labels": _pad([example.labels for example in examples], IGNORED, torch.long),
            "attention_mask": _pad([np.ones_like(example.input_ids) for example in examples], 0, torch.long),
        }
        if any(example.loss_weights is not None for example in examples):
            batch["loss_weights"] = _pad([_weights(example) for example in examples], 0.0, torch.float32)
        return batch


class PackingCollator(_Collator):
    """Make a packed batch of a list of examples: one row of tokens, in which each example is a segment.

    It has `input_ids`, `labels` (-100 on all that is not learned, and on the first token of every segment, which the
    segment before it must not be asked for) and `position_ids` (from 0 in every segment), all [1, T];
    `segment_lengths`, a tuple of ints; `loss_weights` [1, T] where some label weighs other than 1. There is no
    padding, and no `attention_mask`: the attention keeps segments apart (`mllm.models.segment_attention`).

    Example: segments of 3 and 2 tokens have positions [0, 1, 2, 0, 1] and `segment_lengths` (3, 2).
    """

    def texts(self, examples: Sequence[Example]) -> dict[str, Any]:
        if not examples:
            ids = torch.full((1, NUM_EMPTY), self.pad_id)
            positions, lengths = torch.arange(NUM_EMPTY)[None], (NUM_EMPTY,)
            labels = torch.full_like(ids, IGNORED)
            return {"input_ids": ids, "labels": labels, "position_ids": positions, "segment_lengths": lengths}
        batch: dict[str, Any] = {
            "input_ids": _joined([example.input_ids for example in examples], torch.long),
            "labels": _joined([_without_first(example.labels) for example in examples], torch.long),
            "position_ids": _joined([np.arange(len(example.input_ids)) for example in examples], torch.long),
            "segment_lengths": tuple(len(example.input_ids) for example in examples),
        }
        if any(example.loss_weights is not None for example in examples):
            batch["loss_weights"] = _joined([_weights(example) for example in examples], torch.float32)
        return batch


class Collated(NamedTuple):
    """A batch, the rows that were left out of it, its media by kind, and the positions of its rows in the mixture."""

    batch: dict[str, Any]
    left_out: tuple[LeftOut, ...]
    num_media: dict[str, int]
    positions: tuple[int, ...] = ()


class LeavingOut:
    """Collate what can be collated, and say what was left out: an exception must not come from a data worker.

    It would reach the main process as a text in another exception, the message buried in a traceback. There
    `mllm.data.left_out.usable_batches` counts, lists or raises.

    Args:
        collate: Makes a batch of examples.
    """

    def __init__(self, collate: "Collator"):
        self.collate = collate

    def __call__(self, rows: Sequence[Any]) -> Collated:
        """The batch, without rows that cannot be trained on and without those whose media are damaged."""
        left_out = [row for row in rows if isinstance(row, LeftOut)]
        examples: list[Any] = [row for row in rows if not isinstance(row, LeftOut)]
        try:
            return Collated(self.collate(examples), tuple(left_out), _num_media(examples), _positions(examples))
        except MllmError:
            damaged = {id(example): found for example in examples if (found := self._damage(example)) is not None}
        left_out += damaged.values()
        whole = [one for one in examples if id(one) not in damaged]
        return Collated(self.collate(whole), tuple(left_out), _num_media(whole), _positions(whole))

    def _damage(self, example: Any) -> LeftOut | None:
        """What is wrong with the first of a row's media that cannot be had. A damaged cache is no fault of the row."""
        media = self.collate.media_of(example)
        for item in example.media_items:
            try:
                next(media)
            except MediaError as error:
                file = str(item.path or item.blob)
                return LeftOut(example.position, BAD, Bad(example.row.id, example.row.where, file, error.found), error)
            except MllmError as error:
                return LeftOut(example.position, BAD, error=error, is_error=True)
        return None


def decode_media(item: MediaItem, *, where: str) -> Image.Image:
    """The pixels of an image, wherever its bytes lie.

    Raises:
        MediaError: It is not there, or damaged.
    """
    return decode_image(read_media_bytes(item), where=where)


def decode_item(item: MediaItem, source: Any, processor: TrainingProcessor, *, row: int = 0, where: str) -> MediaInput:
    """A media item as a processor takes it, as its tokens are counted.

    Args:
        item: Its kind, its size and what is cut out of it.
        source: What a decoder of this kind takes: a file, or its content.
        processor: Says how sounds are sampled, and which frames of a video are seen.
        row: Number of its row in the batch.
        where: Names the row in errors.

    Raises:
        MediaError: It is not there, damaged, or of another length than was said.
    """
    data: Any
    if item.kind == "audio":
        rate = int(processor.sampling_rate or 0)
        data, _ = decode_audio(source, start=item.start, end=item.end, sampling_rate=rate, where=where)
    elif item.kind == "video":
        times = [(item.start or 0.0) + moment for moment in processor.frame_times(item.size)]
        data = decode_video(source, sampling=times, where=where).frames
    else:
        data = decode_image(source, where=where)
    return processor.fitted(MediaInput(item.kind, data, item.size, row), where=where)


def _num_media(examples: Sequence[Any]) -> dict[str, int]:
    return dict(Counter(item.kind for example in examples for item in example.media_items))


def _positions(examples: Sequence[Any]) -> tuple[int, ...]:
    return tuple(example.position for example in examples)


def _decoded(example: Example, processor: TrainingProcessor, row: int) -> Iterator[MediaInput]:
    """The media of a row, decoded as they are asked for.

    Args:
        example: The row.
        processor: Says how sounds are sampled, and what it cannot read.
        row: Its number in the batch.
    """
    for place, item in enumerate(example.media_items):
        source = read_media_bytes(item) if example.media is None else example.media[place]
        yield decode_item(item, source, processor, row=row, where=example.row.name)


def _pad(rows: Sequence[Any], value: int | float, dtype: torch.dtype) -> Tensor:
    """Stack sequences of unequal length, padded on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=dtype)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.as_tensor(values, dtype=dtype)
    return padded


def _joined(rows: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Sequences one behind the other, as one row."""
    return torch.as_tensor(np.concatenate(rows)).to(dtype)[None]


def _weights(example: Example) -> np.ndarray:
    """The weights of an example's labels, 1 where it has none of its own."""
    return np.ones(len(example.labels), np.float32) if example.loss_weights is None else example.loss_weights


def _without_first(labels: np.ndarray) -> np.ndarray:
    """The first token of a row has nothing before it that could tell it."""
    return np.concatenate([np.array([IGNORED], labels.dtype), labels[1:]])
