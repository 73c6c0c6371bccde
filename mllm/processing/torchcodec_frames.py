"""Frames by torchcodec, where it is installed and finds its FFmpeg. Runs in the decoders' process only."""

from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

_OLDEST = (0, 12)  # from here on it turns frames as the file says


def torchcodec_frames(source: Path | bytes, places: np.ndarray, times: np.ndarray) -> np.ndarray | None:
    """Frames at some places, or None where torchcodec is absent, fails, or counts the frames in another way.

    Args:
        source: The file, or its content.
        places: Indices of the frames, ascending.
        times: When all frames of the file are shown, in seconds of the stream's own clock.

    Returns:
        RGB `[frames, height, width, 3]`, upright.
    """
    decoder_class = video_decoder_class()
    if decoder_class is None:
        return None
    try:
        decoder = decoder_class(
            source if isinstance(source, bytes) else str(source),
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode="exact",
        )
        if decoder.metadata.num_frames_from_content != len(times):
            return None
        batch = decoder.get_frames_at(indices=places.tolist())
    except (RuntimeError, ValueError, IndexError):
        return None  # PyAV either reads it or says what is wrong with it
    if not np.allclose(batch.pts_seconds.numpy(), times[places], atol=1e-3):
        return None
    return batch.data.numpy()


@cache
def video_decoder_class() -> Any:
    """The decoder of torchcodec; None where it cannot be imported, as is usual without FFmpeg's libraries."""
    try:
        version = tuple(int(part) for part in metadata.version("torchcodec").split("+")[0].split(".")[:2])
        if version < _OLDEST:
            return None
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError, ValueError, MemoryError):
        return None
    return VideoDecoder
