"""What a model is told of the sizes of media, where only their features are at hand."""

from collections.abc import Mapping, Sequence

import torch

from mllm.shapes import Tensor
from mllm.sizes import ImageTokenRule, MediaRule, MediaSize, kind_of_size
from mllm.sizes.audio import AudioTokenRule
from mllm.sizes.video import VideoTokenRule


def size_inputs(sizes: Sequence[MediaSize], rules: Mapping[str, MediaRule]) -> dict[str, Tensor]:
    """The `image_sizes`, `audio_sizes` and `video_sizes` that a processor gives for decoded media of these sizes.

    Args:
        sizes: Of the media of a batch, in order of appearance.
        rules: Of the kinds that the model reads.
    """
    inputs = {}
    for kind, rule in rules.items():
        own = [size for size in sizes if kind_of_size(size) == kind]
        if own and not (isinstance(rule, ImageTokenRule) and rule.tiles is None):
            inputs[f"{kind}_sizes"] = torch.tensor([_told(size, rule) for size in own])
    return inputs


def _told(size: MediaSize, rule: MediaRule) -> int | list[int]:
    if isinstance(rule, AudioTokenRule):
        return rule.num_samples(size[0])
    if isinstance(rule, VideoTokenRule):
        return len(rule.times(size))
    return [int(side) for side in size[:2]]
