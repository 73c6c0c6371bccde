"""Decoded media, on their way from a row to a processor."""

from typing import Any, NamedTuple

from mllm.sizes import MediaSize


class MediaInput(NamedTuple):
    """A decoded media item.

    Args:
        kind: "image", "audio" or "video".
        data: An upright RGB `PIL.Image`; an array of samples of one channel at the processor's rate; of a video the
            frames that are seen.
        size: What its row says of it, and its tokens were counted by.
        row: Number of its row in the batch.
    """

    kind: str
    data: Any
    size: MediaSize
    row: int = 0
