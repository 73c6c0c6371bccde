"""The media of a batch, as a forward takes them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mllm.errors import RowError
from mllm.models.connectors import Layout, Question
from mllm.shapes import EncoderFeatures, Float, Int, MediaFeatures, MediaVectors, Shaped, Tensor
from mllm.sizes import MediaRule
from mllm.sizes.audio import AudioTokenRule
from mllm.sizes.video import VideoTokenRule

MediaSizes = Int[Tensor, "N ..."]
"""What the layout of a batch's items follows from: height and width of an image [N, 2], samples of a sound [N], frames
that are seen of a video [N]."""

VALUES = {"image": "pixel_values", "audio": "input_features", "video": "pixel_values_videos"}
"""By what names the encoders' inputs come, which are those of stock models."""


class Media(NamedTuple):
    """The media of one modality in a batch, by the names that a forward has them under.

    Args:
        modality: "image", "audio" or "video".
        values: All views of all items, in order of appearance; under the name in `VALUES`.
        sizes: Of each item, `{modality}_sizes`; None where each has one view, of which all features count.
        features: What the encoder gave for these views before, `{modality}_features`, in place of their values; with
            no views where the batch has none. Every batch of a run has them, or none.
        question_ids: What each item is asked about, `{modality}_question_ids`, for connectors that read it.
        question_mask: `{modality}_question_mask`, 1 for tokens and 0 for padding.
        places: Which item stands at each place of the texts, `{modality}_places`; None where each stands at one, in
            order. The two answers of a preference share an image that is encoded once.
    """

    modality: str
    values: Shaped[Tensor, "..."] | None = None
    sizes: Shaped[Tensor, "..."] | None = None
    features: Shaped[Tensor, "..."] | None = None
    question_ids: Tensor | None = None
    question_mask: Tensor | None = None
    places: Int[Tensor, " places"] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing of this modality in the batch."""
        views = self.values if self.features is None else self.features
        return views is None or len(views) == 0

    @property
    def question(self) -> Question | None:
        """What each item is asked about."""
        if self.question_ids is None or self.question_mask is None:
            return None
        return Question(self.question_ids, self.question_mask)


def take_media(modality: str, inputs: dict[str, Any]) -> Media:
    """Take what belongs to a modality out of a forward's arguments."""
    names = ("sizes", "features", "question_ids", "question_mask", "places")
    rest = {name: inputs.pop(f"{modality}_{name}", None) for name in names}
    return Media(modality, inputs.pop(VALUES[modality], None), **rest)


def media_layout(rule: MediaRule, sizes: MediaSizes, *, num_views: int) -> Layout:
    """How the views of a batch belong to its items, whose sizes these are.

    Raises:
        RowError: An item is too large, or has nothing in it; or there are more or fewer views than the items have.
    """
    layout = _layout(rule, sizes.tolist())
    expected = sum(map(len, layout.views))
    if expected != num_views:
        raise RowError(
            f"{num_views} views of {len(layout.views)} items of kind {rule.kind}, of sizes {layout.sizes!r:.80}",
            expected=f"{expected} views, as the sizes say",
            do="prepare values and sizes with one processor, that of this checkpoint",
        )
    return layout


def _layout(rule: MediaRule, plain: list[Any]) -> Layout:
    if isinstance(rule, VideoTokenRule):
        return Layout([rule.views_of_frames(frames) for frames in plain], [(frames,) for frames in plain])
    if isinstance(rule, AudioTokenRule):
        items: list[tuple] = [(samples / rule.sampling_rate,) for samples in plain]
    else:
        items = [(height, width) for height, width in plain]
    return Layout([rule.views(size) for size in items], items)


def sounding_samples(rule: MediaRule, sizes: MediaSizes | None, *, num_views: int) -> Int[Tensor, " views"]:
    """How many samples of each view are sound: all, where no sizes are given; 0 of views that are no sound."""
    if not isinstance(rule, AudioTokenRule):
        return torch.zeros(num_views, dtype=torch.long)
    if sizes is None:
        return torch.full((num_views,), rule.window)
    items = media_layout(rule, sizes, num_views=num_views).sizes
    return torch.tensor([samples for size in items for samples in rule.samples(size)])


def at_places(
    items: MediaFeatures | Sequence[MediaVectors], places: Int[Tensor, " places"]
) -> Float[Tensor, "places V D"] | list[MediaVectors]:
    """The item that stands at each place of the texts, in order; of one tensor without waiting for the device."""
    if isinstance(items, Tensor):
        return items[places]
    return [items[item] for item in places.tolist()]


def items_of_rows(items: list[MediaVectors], num_placeholders: list[int]) -> list[list[MediaVectors]]:
    """The items of a batch, in order, by the row whose placeholders they fill."""
    rest, rows = iter(items), []
    for wanted in num_placeholders:
        row: list[MediaVectors] = []
        while sum(map(len, row)) < wanted:
            row.append(next(rest))
        rows.append(row)
    return rows


def select_features(hidden: Float[Tensor, "views P D_encoder"], rule: MediaRule) -> EncoderFeatures:
    """Drop what stands in front of the patches, as far as the rule says so."""
    return hidden[:, rule.num_dropped :] if rule.num_dropped else hidden
