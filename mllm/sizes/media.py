"""What the size of a media item is."""

MediaSize = tuple[int, int] | tuple[float] | tuple[int, int, int, float]
"""Height and width of an image in pixels; the seconds of a sound; height, width, frames and seconds of a video."""
LONGEST_SOUND = float("inf")
"""Seconds that stand for the longest sound that a model reads."""
LONGEST_SECONDS = 3600.0
"""Of sound that one media item may have: an hour at 16 kHz takes 230 MB."""

_KINDS = {2: "image", 1: "audio", 4: "video"}


def kind_of_size(size: MediaSize) -> str:
    """Of what kind of medium this is the size."""
    return _KINDS[len(size)]
