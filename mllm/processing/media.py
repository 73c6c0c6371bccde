"""Decoded media, on their way from a row to a processor."""

from typing import Any, NamedTuple

from mllm.sizes import MediaSize


class MediaInput(NamedTuple):
    """A decoded media item.

    Args:
        kind: "image" or "audio".
        data: An upright RGB `PIL.Image`, or an array of samples of one channel at the processor's rate.
        size: What its row says of it, and its tokens were counted by: (height, width), or (seconds,).
        row: Number of its row in the batch.
    """

    kind: str
    data: Any
    size: MediaSize
    row: int = 0
