"""Several streams of features, which one tensor carries from the encoder to the connector. Pure functions."""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from mllm.shapes import EncoderFeatures, Float, Tensor

Streams = tuple[Float[Tensor, "views _ _"], ...]
"""Of every stream its features [views, L_i, D_i]."""


def join_streams(streams: Sequence[Float[Tensor, "views _ _"]]) -> EncoderFeatures:
    """One stream behind another; zeros fill up the narrower ones.

    Whatever stands between encoder and connector (chunks, caches, ranks without media) so knows of one tensor alone.

    Example: streams of [views, 32, 768] and [views, 257, 1024] become [views, 289, 1024].
    """
    width = max(stream.shape[-1] for stream in streams)
    return torch.cat([pad(stream, (0, width - stream.shape[-1])) for stream in streams], dim=1)


def split_streams(features: EncoderFeatures, *, lengths: Sequence[int], widths: Sequence[int]) -> Streams:
    """What `join_streams` joined.

    Args:
        features: Of all views.
        lengths: Features of each stream.
        widths: Of each stream's features.
    """
    parts = features.split(list(lengths), dim=1)
    return tuple(part[..., :width] for part, width in zip(parts, widths, strict=True))
