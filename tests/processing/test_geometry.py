"""The fast path makes the very pixels that stock LLaVA preprocessing makes, for every geometry, size and encoder."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil

from mllm.errors import CompositionError, OptionError
from mllm.processing.build import load_image_processor
from mllm.processing.geometry import GEOMETRIES, encode_rgb, is_square_geometry, llava_image_processor

SIZES = [(48, 48), (100, 37), (37, 100), (47, 49), (20, 10), (1, 7), (200, 1), (48, 49), (333, 500)]


def _noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("encoder", [CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("image_size", [48, 65])
def test_equal_to_stock_bit_for_bit(encoder, geometry, image_size):
    settings = llava_image_processor(encoder(), image_size=image_size, geometry=geometry)
    images = [_noise(*size) for size in SIZES]
    fast = encode_rgb(images, settings)
    assert fast.dtype == torch.float32
    assert torch.equal(fast, settings(images, return_tensors="pt")["pixel_values"])


def test_the_encoders_colours_and_filter_are_kept():
    encoder = CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2)
    settings = llava_image_processor(encoder, image_size=8, geometry="pad")
    assert (settings.image_mean, settings.image_std, settings.resample) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 2)
    pixels = encode_rgb([Image.new("RGB", (8, 4), "white")], settings)
    assert pixels[0, 0, 4, 4].item() == pytest.approx((1 - 0.1) / 0.4)
    mean_colour = (int(0.1 * 255) / 255 - 0.1) / 0.4
    assert pixels[0, 0, 0, 0].item() == pytest.approx(mean_colour)


def test_geometries_differ_as_their_names_say():
    """A wide image: red left third, green middle, blue right."""
    picture = Image.new("RGB", (96, 32), (0, 255, 0))
    picture.paste((255, 0, 0), (0, 0, 32, 32))
    picture.paste((0, 0, 255), (64, 0, 96, 32))
    plain = CLIPImageProcessorPil(image_mean=[0, 0, 0], image_std=[1, 1, 1])
    seen = {
        geometry: encode_rgb([picture], llava_image_processor(plain, image_size=32, geometry=geometry))[0]
        for geometry in GEOMETRIES
    }
    middle = {
        name: [tuple(pixels[:, 16, x].round().int().tolist()) for x in (2, 16, 29)] for name, pixels in seen.items()
    }
    red, green, blue = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    assert middle == {"pad": [red, green, blue], "crop": [green, green, green], "squash": [red, green, blue]}
    assert seen["pad"][:, 2, 16].abs().max() == 0, "above the padded image is the mean colour"
    assert seen["squash"][:, 2, 16].round().tolist() == [0, 1, 0]


def test_no_images_make_an_empty_batch():
    settings = llava_image_processor(CLIPImageProcessorPil(), image_size=8, geometry="pad")
    assert encode_rgb([], settings).shape == (0, 3, 8, 8)


def test_unknown_geometry():
    with pytest.raises(OptionError, match="pad, crop, squash"):
        llava_image_processor(CLIPImageProcessorPil(), image_size=8, geometry="stretch")


@pytest.mark.parametrize("absent", ["resample", "rescale_factor", "do_rescale", "do_normalize"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_setting_that_an_encoder_leaves_open(absent, geometry):
    settings = llava_image_processor(CLIPImageProcessorPil(**{absent: None}), image_size=24, geometry=geometry)
    image = _noise(30, 20)
    assert torch.equal(encode_rgb([image], settings), settings([image], return_tensors="pt")["pixel_values"].float())


def test_only_settings_that_make_a_square_take_the_fast_path():
    assert all(
        is_square_geometry(llava_image_processor(CLIPImageProcessorPil(), image_size=24, geometry=geometry))
        for geometry in GEOMETRIES
    )
    square = {"height": 24, "width": 24}
    for other in (
        LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=square),
        LlavaImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 30}, crop_size=square),
        LlavaImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 20}),
        LlavaImageProcessorPil(size={"shortest_edge": 24}, crop_size=square, do_center_crop=False),
        LlavaImageProcessorPil(size={"shortest_edge": 24}, crop_size=square, do_resize=False),
        CLIPImageProcessorPil(),
    ):
        assert not is_square_geometry(other)


def test_an_encoder_without_a_pil_variant(tmp_path):
    stated = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "resample": 2, "do_center_crop": None}
    config = tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps({"image_processor_type": "DINOv3ViTImageProcessor", **stated}))
    encoder = load_image_processor(str(tmp_path))
    assert (encoder.image_mean, encoder.image_std, encoder.resample) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 2)


def test_an_encoder_that_states_nothing(tmp_path):
    if importlib.util.find_spec("torchvision"):
        pytest.skip("then its own class can be asked")
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "DINOv3ViTImageProcessor"}')
    with pytest.raises(CompositionError, match="does not state its colours"):
        load_image_processor(str(tmp_path))
