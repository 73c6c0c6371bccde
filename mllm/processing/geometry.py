"""How an image becomes the square that an encoder sees: stock settings for each geometry, and their fast execution."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, LlavaImageProcessorPil
from transformers.image_transforms import normalize, rescale

from mllm.errors import OptionError
from mllm.shapes import Pixels

GEOMETRIES = ("pad", "crop", "squash")


def llava_image_processor(encoder: BaseImageProcessor, *, image_size: int, geometry: str) -> LlavaImageProcessorPil:
    """Stock LLaVA preprocessing with an encoder's own colours and filter.

    "pad" makes a square with the encoder's mean colour, then resizes it; "crop" resizes the shortest edge and crops
    the centre; "squash" resizes to the square, whatever the proportions.

    Raises:
        OptionError: The geometry has another name.
    """
    if geometry not in GEOMETRIES:
        raise OptionError(
            f"geometry = {geometry!r}", expected=f"one of {', '.join(GEOMETRIES)}", do="set `geometry` to one of them"
        )
    square = {"height": image_size, "width": image_size}
    return LlavaImageProcessorPil(
        do_pad=geometry == "pad",
        do_resize=True,
        size=square if geometry == "squash" else {"shortest_edge": image_size},
        do_center_crop=geometry != "squash",
        crop_size=square,
        # What stock processors do where a setting is absent.
        resample=Image.Resampling.BILINEAR if encoder.resample is None else encoder.resample,
        do_rescale=bool(encoder.do_rescale),
        rescale_factor=1 / 255 if encoder.rescale_factor is None else encoder.rescale_factor,
        do_normalize=bool(encoder.do_normalize),
        image_mean=encoder.image_mean,
        image_std=encoder.image_std,
        do_convert_rgb=True,
    )


def is_square_geometry(settings: BaseImageProcessor) -> bool:
    """Whether `encode_rgb` knows what these settings ask for: those of `llava_image_processor` are of that kind."""
    if not isinstance(settings, LlavaImageProcessorPil) or settings.image_mean is None or not settings.do_resize:
        return False
    square = settings.crop_size
    if settings.do_center_crop:
        return square.height == square.width == settings.size.shortest_edge and settings.size.longest_edge is None
    return (square.height, square.width) == (settings.size.height, settings.size.width)


def encode_rgb(images: list[Image.Image], settings: LlavaImageProcessorPil) -> Pixels:
    """What `settings(images, return_tensors="pt").pixel_values` gives for RGB images, bit for bit, but faster.

    Pixels stay 8-bit in PIL until the image has its final size; scale, mean and standard deviation are then looked up
    in a table of 256 values for each channel.
    """
    table = _colour_table(settings)
    height, width = settings.crop_size["height"], settings.crop_size["width"]
    pixels = np.empty((len(images), 3, height, width), dtype=np.float32)
    for row, image in zip(pixels, images, strict=True):
        square = np.asarray(_square(image, settings))
        for channel in range(3):
            np.take(table[channel], square[:, :, channel], out=row[channel])
    return torch.from_numpy(pixels)


def _square(image: Image.Image, settings: LlavaImageProcessorPil) -> Image.Image:
    height, width = settings.crop_size["height"], settings.crop_size["width"]
    if settings.do_pad:
        image = _pad(image, settings.image_mean)
    if not settings.do_center_crop or image.width == image.height:
        return image if image.size == (width, height) else image.resize((width, height), resample=settings.resample)
    shorter, longer = min(image.size), max(image.size)
    longer = int(height * longer / shorter)
    size = (height, longer) if image.width < image.height else (longer, height)
    image = image if image.size == size else image.resize(size, resample=settings.resample)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, mean: Sequence[int | float]) -> Image.Image:
    if image.width == image.height:
        return image
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _colour_table(settings: LlavaImageProcessorPil) -> np.ndarray:
    """Shape [3, 256]: what stock rescaling and normalising make of each 8-bit value."""
    values = np.tile(np.arange(256, dtype=np.uint8), (3, 1))[:, None, :]
    if settings.do_rescale:
        values = rescale(values, settings.rescale_factor, input_data_format="channels_first")
    if settings.do_normalize:
        values = normalize(values, settings.image_mean, settings.image_std, input_data_format="channels_first")
    return np.ascontiguousarray(values[:, 0, :], dtype=np.float32)
