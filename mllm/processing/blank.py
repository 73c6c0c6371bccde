"""A medium that shows nothing, for a rank that has none."""

import numpy as np
from PIL import Image

from mllm.processing.media import MediaInput
from mllm.processing.stock import StockProcessor
from mllm.shapes import Tensor

SIDE = 32
SECONDS = 0.5


def blank_media(processor: StockProcessor) -> dict[str, Tensor]:
    """The model's inputs for one small black image, or half a second of silence; none for a model without media."""
    if "image" in processor.media_kinds:
        return processor.encode_media([MediaInput("image", Image.new("RGB", (SIDE, SIDE)), (SIDE, SIDE))])
    if "audio" in processor.media_kinds:
        silence = np.zeros(round(SECONDS * int(processor.sampling_rate or 0)), np.float32)
        return processor.encode_media([MediaInput("audio", silence, (SECONDS,))])
    return {}
