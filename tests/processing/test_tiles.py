"""The pixels of tiles are those of the stock image processors that cut the same way, bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GotOcr2ImageProcessorPil, LlavaNextImageProcessorPil, SiglipImageProcessorPil

from mllm.assemble.tiles import TILES
from mllm.errors import MediaError
from mllm.processing.geometry import encode_rgb, llava_image_processor
from mllm.processing.media import MediaInput
from mllm.processing.tiles import encode_views, fitted_image, image_views
from mllm.sizes import ImageTokenRule

SIDE = 28
# Square, nearly square, wide, high, smaller than a tile, one pixel high or wide, as thin as images may be.
SIZES = [(60, 60), (59, 61), (30, 100), (90, 31), (5, 9), (1, 1), (1, 70), (200, 1), (13, 170), (333, 121)]


def _noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _rule(name: str, **fields) -> ImageTokenRule:
    return ImageTokenRule(SIDE, 14, 0, "full", tiles=TILES[name], **fields)


def _ours(images, name: str, geometry: str, encoder) -> dict[str, torch.Tensor]:
    settings = llava_image_processor(encoder, image_size=SIDE, geometry=geometry)
    return encode_views(images, _rule(name), settings, lambda views: encode_rgb(list(views), settings))


def test_llava_next():
    images = [_noise(*size) for size in SIZES]
    stock = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[rows * SIDE, columns * SIDE] for rows, columns in TILES["llava_next"].grids],
    )
    expected = stock(images, return_tensors="pt")
    ours = _ours(images, "llava_next", "squash", stock)
    assert torch.equal(ours["image_sizes"], expected["image_sizes"])
    rule, start = _rule("llava_next"), 0
    for size, views in zip(SIZES, expected["pixel_values"], strict=True):
        count = len(rule.views(size))
        assert torch.equal(ours["pixel_values"][start : start + count], views[:count].float()), size
        assert not views[count:].any(), "behind an image's views is padding"
        start += count
    assert start == len(ours["pixel_values"])


def test_internvl():
    images = [_noise(*size) for size in SIZES]
    stock = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=12)
    expected = stock(images, return_tensors="pt")
    ours = _ours(images, "internvl", "squash", stock)
    assert torch.equal(ours["pixel_values"], expected["pixel_values"].float())
    assert [len(_rule("internvl").views(size)) for size in SIZES] == expected["num_patches"].tolist()


def test_sphinx():
    """A red left half and a blue right one, twice as wide as high: mean colour above and below, in each quarter."""
    picture = Image.new("RGB", (80, 40), "red")
    picture.paste((0, 0, 255), (40, 0, 80, 40))
    encoder = SiglipImageProcessorPil(image_mean=[0.2, 0.4, 0.6], image_std=[1, 1, 1])
    pixels = _ours([picture], "sphinx", "pad", encoder)["pixel_values"]
    mean = torch.tensor([int(255 * value) / 255 - value for value in (0.2, 0.4, 0.6)])
    red, blue = torch.tensor([0.8, -0.4, -0.6]), torch.tensor([-0.2, -0.4, 0.4])
    # View, line, cell: the corners of the overview, then the inner and outer corners of the four quarters.
    seen = {
        (0, 1, 1): mean, (0, 13, 1): red, (0, 13, 26): blue, (0, 26, 26): mean,
        (1, 1, 1): mean, (1, 26, 1): red, (2, 26, 26): blue, (2, 1, 26): mean,
        (3, 1, 1): red, (3, 26, 1): mean, (4, 1, 26): blue, (4, 26, 26): mean,
    }  # fmt: skip
    assert len(pixels) == 5
    for (view, line, cell), colour in seen.items():
        torch.testing.assert_close(pixels[view, :, line, cell], colour, rtol=0, atol=1e-2, msg=f"{view, line, cell}")


@pytest.mark.parametrize("name", TILES)
def test_an_image_alone_is_as_in_company(name):
    images = [_noise(*size) for size in SIZES]
    settings = llava_image_processor(SiglipImageProcessorPil(), image_size=SIDE, geometry="squash")
    alone = [view.tobytes() for image in images for view in image_views(image, _rule(name), settings)]
    assert len(alone) == sum(len(_rule(name).views(size)) for size in SIZES)
    together = _ours(images, name, "squash", SiglipImageProcessorPil())["pixel_values"]
    single = torch.cat([_ours([image], name, "squash", SiglipImageProcessorPil())["pixel_values"] for image in images])
    assert torch.equal(together, single)


def test_a_row_that_states_another_size_is_bad():
    item = MediaInput("image", _noise(20, 30), (20, 30))
    rule, other = _rule("llava_next"), item._replace(size=(30, 20))
    assert fitted_image(item, rule, where="row 7") is item
    assert fitted_image(other, dataclasses.replace(rule, tiles=None), where="row 7") is other, "it becomes a square"
    with pytest.raises(MediaError, match=r"row 7: an image of 20 x 30 .*says is 30 x 20"):
        fitted_image(other, rule, where="row 7")
