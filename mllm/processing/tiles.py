"""Images to tiles, squares of the encoder's size; which ones, `mllm.sizes.tiles` says."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from mllm.errors import MediaError
from mllm.processing.media import MediaInput
from mllm.shapes import Pixels, Tensor
from mllm.sizes import ImageTokenRule, TileRule


def encode_views(
    images: Sequence[Image.Image],
    rule: ImageTokenRule,
    settings: Any,
    encode_images: Callable[[Sequence[Image.Image]], Pixels],
) -> dict[str, Tensor]:
    """All views of all images as the encoder takes them; with each image's height and width where there are tiles.

    Args:
        images: RGB.
        rule: Says which views an image has.
        settings: The image processor, whose filter and mean colour are used.
        encode_images: From images of any size to the encoder's pixels, in its own geometry.
    """
    if rule.tiles is None:
        return {"pixel_values": encode_images(images)}
    views = [view for image in images for view in image_views(image, rule, settings)]
    return {
        "pixel_values": encode_images(views),
        "image_sizes": torch.tensor([[image.height, image.width] for image in images]),
    }


def image_views(image: Image.Image, rule: ImageTokenRule, settings: Any) -> list[Image.Image]:
    """The views of one image in their order. The overview is the image itself: geometry makes a square of it."""
    tiles, side = rule.tiles, rule.image_size
    assert tiles is not None
    rows, columns = tiles.grid((image.height, image.width), side)
    canvas = _on_canvas(image, (columns * side, rows * side), tiles, settings)
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    return tiles.joined(image, [canvas.crop((left, top, left + side, top + side)) for left, top in corners])


def fitted_image(item: MediaInput, rule: ImageTokenRule, *, where: str) -> MediaInput:
    """An image; one that is to be cut into tiles must have the size that its tokens were counted by.

    Raises:
        MediaError: It has another.
    """
    found, stated = (item.data.height, item.data.width), tuple(int(side) for side in item.size)
    if rule.tiles is None or found == stated:
        return item
    raise MediaError(
        f"{where}: an image of {found[0]} x {found[1]} (height x width), which the row says is "
        f"{stated[0]} x {stated[1]}",
        expected="the size that the file has: its tiles are counted by it",
        do="correct the row's media, or leave the size out",
    )


def _on_canvas(image: Image.Image, target: tuple[int, int], tiles: TileRule, settings: Any) -> Image.Image:
    """The image fitted to a canvas of this width and height."""
    if tiles.fit == "squash":
        return _resized(image, target, settings)
    width_scale, height_scale = target[0] / image.width, target[1] / image.height
    if width_scale < height_scale:
        size = (target[0], min(math.ceil(image.height * width_scale), target[1]))
    else:
        size = (min(math.ceil(image.width * height_scale), target[0]), target[1])
    colour = (0, 0, 0) if tiles.fill == "black" else tuple(int(value * 255) for value in settings.image_mean)
    canvas = Image.new("RGB", target, colour)
    canvas.paste(_resized(image, size, settings), ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2))
    return canvas


def _resized(image: Image.Image, size: tuple[int, int], settings: Any) -> Image.Image:
    return image if image.size == size else image.resize(size, resample=settings.resample)
