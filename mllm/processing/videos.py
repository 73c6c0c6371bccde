"""Videos to the inputs of an image encoder, frame after frame, and to what the prompt says of them."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from mllm.processing.chat import Expansion
from mllm.processing.media import MediaInput
from mllm.shapes import Pixels, Tensor
from mllm.sizes import MediaRule, MediaSize, num_tokens
from mllm.sizes.video import VideoTokenRule

SENTENCE = "The video contains {} frames sampled at {} seconds."
"""Of Video-LLaMA's second stage (`load_video` in its `video_llama/processors/video_processor.py`)."""


def video_text(size: MediaSize, rule: MediaRule, placeholder: str) -> Expansion:
    """What a video becomes in the text: a run of placeholders, or with times a run for each frame behind its own.

    Where all frames are read as one sequence, a sentence behind their run has all times.

    Example: two frames of two tokens with their times are "0.0s: <video><video>", a newline, "1.5s: <video><video>".

    Raises:
        RowError: It has no frames, or more than it may have.
    """
    assert isinstance(rule, VideoTokenRule)
    if not rule.has_timestamps:
        return Expansion("video", placeholder, (num_tokens(size, rule),))
    times = [_written(moment) for moment in rule.times(size)]
    if rule.is_joined:
        sentence = SENTENCE.format(len(times), ", ".join(times))
        return Expansion("video", f"{placeholder}\n{sentence}", (num_tokens(size, rule),))
    text = "\n".join(f"{moment}s: {placeholder}" for moment in times)
    return Expansion("video", text, tuple(rule.connector.count(length) for length in rule.views(size)))


def most_video_tokens(seconds: float, rule: MediaRule) -> int:
    """At least as many tokens as any video becomes that is no longer than this, whatever its frames."""
    assert isinstance(rule, VideoTokenRule)
    frames = rule.most_frames_within(seconds)
    if rule.is_joined:
        tokens = rule.connector.count(frames * rule.features)
        written = len("\n" + SENTENCE.format(frames, ", ".join([_written(seconds)] * frames))) + 1
    else:
        tokens = frames * rule.connector.count(rule.features)
        # A character is a token at most, and so is the blank that some tokenizers put in front of a text.
        written = frames * (len(f"{_written(seconds)}s: \n") + 1)
    return tokens + written * rule.has_timestamps


def _written(moment: float) -> str:
    return f"{moment:.1f}"


def encode_videos(
    items: Sequence[MediaInput], encode_images: Callable[[Sequence[Image.Image]], Pixels]
) -> dict[str, Tensor]:
    """The frames of all videos as the image encoder takes them, and each video's number of frames."""
    frames = [frame for item in items for frame in item.data]
    return {
        "pixel_values_videos": encode_images(frames),
        "video_sizes": torch.tensor([len(item.data) for item in items]),
    }
