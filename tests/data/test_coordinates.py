"""Boxes in a text mark the same pixels of what the model sees as they marked of the published image."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from mllm.data.coordinates import FORMS, CroppedAwayError, from_pixels, move_boxes, move_row, to_pixels
from mllm.data.schema import COORDINATES, parse_row
from mllm.errors import OptionError, RowError
from mllm.processing.geometry import GEOMETRIES, encode_rgb, llava_image_processor

SIDE = 112
SIZES = [(300, 500), (500, 300), (331, 500), (224, 224), (90, 401)]


def _written(box: tuple, size: tuple[int, int], declared: str) -> str:
    """A box of pixels as a source of this kind writes it; independent of the code under test."""
    (left, top, right, bottom), (height, width) = box, size
    if declared == "pixel":
        return f"[{left}, {top}, {right}, {bottom}]"
    if declared == "padded_unit":
        side = max(size)
        x, y = (side - width) // 2, (side - height) // 2
        shares = [(left + x) / side, (top + y) / side, (right + x) / side, (bottom + y) / side]
    else:
        shares = [left / width, top / height, right / width, bottom / height]
    if declared == "thousandths":
        return "[" + ",".join(str(round(1000 * share)) for share in shares) + "]"
    return "[" + ", ".join(f"{share:.3f}" for share in shares) + "]"


def _seen(size: tuple[int, int], box: tuple, geometry: str) -> np.ndarray:
    """Where the encoder's square shows a white rectangle on black: [SIDE, SIDE] of True and False."""
    image = Image.new("RGB", (size[1], size[0]), "black")
    image.paste("white", box)
    encoder = CLIPImageProcessorPil(image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0], resample=2)
    pixels = encode_rgb([image], llava_image_processor(encoder, image_size=SIDE, geometry=geometry))
    return pixels[0, 0].numpy() > 0.5


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("declared", COORDINATES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_moved_box_marks_what_the_model_sees(size, declared, geometry):
    height, width = size
    box = (width // 2 - 30, height // 2 - 25, width // 2 + 40, height // 2 + 45)  # inside every centre crop
    shown = _seen(size, box, geometry)
    moved = move_boxes(_written(box, size, declared), declared=declared, size=size, geometry=geometry)
    ys, xs = np.nonzero(shown)
    left, top, right, bottom = (float(number) * SIDE for number in re.findall(r"[\d.]+", moved))
    found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert np.allclose((left, top, right, bottom), found, atol=1.5)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("form", FORMS)
def test_the_map_and_its_inverse_are_the_identity(form, geometry, size):
    for box in np.random.default_rng(0).uniform(-2, 2, (50, 4)).tolist():
        there = from_pixels(tuple(box), form=form, size=size, geometry=geometry)
        assert np.allclose(to_pixels(there, form=form, size=size, geometry=geometry), box, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_padding_and_back_is_the_identity_within_rounding(size):
    for left, top, right, bottom in np.random.default_rng(1).integers(0, 1001, (50, 4)).tolist():
        box = [min(left, right) / 1000, min(top, bottom) / 1000, max(left, right) / 1000, max(top, bottom) / 1000]
        text = f"[{box[0]:.3f}, {box[1]:.3f}, {box[2]:.3f}, {box[3]:.3f}]"
        padded = move_boxes(text, declared="unit", to="padded_unit", size=size, geometry="pad")
        back = move_boxes(padded, declared="padded_unit", to="unit", size=size, geometry="pad")
        rounding = 0.0006 * max(size) / min(size) + 0.0006
        assert np.allclose(json.loads(back), json.loads(text), atol=rounding)


def test_values_worked_out_by_hand():
    def moved(text, declared, geometry, size=(100, 200)):
        return move_boxes(text, declared=declared, size=size, geometry=geometry)

    assert moved("the cup [0.5, 0.5, 1.0, 1.0].", "unit", "pad") == "the cup [0.5, 0.5, 1.0, 0.75]."
    assert moved("[100,50,200,100]", "pixel", "pad") == "[0.5,0.5,1.0,0.75]"  # blanks as the source writes them
    assert moved("[500, 500, 1000, 1000]", "thousandths", "squash") == "[0.5, 0.5, 1.0, 1.0]"
    assert moved("[100, 0, 200, 100]", "pixel", "crop") == "[0.5, 0.0, 1.0, 1.0]"  # the right quarter is cut off
    assert moved('{"bbox_2d": [0, 0, 200, 100]}', "pixel", "pad") == '{"bbox_2d": [0.0, 0.25, 1.0, 0.75]}'


def test_decimals_are_those_of_the_source():
    def decimals(text, declared):
        moved = move_boxes(text, declared=declared, size=(301, 700), geometry="pad")
        return max(len(number.partition(".")[2]) for number in re.findall(r"[\d.]+", moved))

    assert decimals("[0.1, 0.2, 0.33, 0.44]", "unit") == 2
    assert decimals("[0.111, 0.2, 0.33, 0.44]", "unit") == decimals("[1.23456, 0.2, 3.3, 4.4]", "pixel") == 3
    assert decimals("[11, 22, 333, 144]", "pixel") == decimals("[11, 22, 333, 444]", "thousandths") == 3


def test_a_box_that_already_says_what_is_seen_keeps_its_letters():
    text = "[0.10, 0.2, .., x] the dog [0.10, 0.200, 0.50, 1.0] and [ 0.1 ,0.2,0.3 ,0.4 ]"
    assert move_boxes(text, declared="padded_unit", size=(331, 500), geometry="pad") == text
    assert move_boxes(text, declared="unit", size=(331, 500), geometry="squash") == text


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ("unit", "the list [1, 2, 3, 4]"),
        ("unit", "bits [0, 0, 1, 1] without a decimal point"),
        ("unit", "right is left of left: [0.5, 0.1, 0.2, 0.9]"),
        ("unit", "a point [0.5, 0.5] and five [0.1, 0.2, 0.3, 0.4, 0.5]"),
        ("unit", "nothing wide or high: [0.5, 0.5, 0.5, 0.5]"),
        ("pixel", "the years [1990, 1995, 2000, 2005]"),
        ("thousandths", "too much: [100, 200, 1100, 400]"),
        ("pixel", "[a, b, c, d] [1;2;3;4] [1, 2, 3, 4 (0.1, 0.2, 0.3, 0.4)"),
    ],
)
def test_numbers_that_are_no_box_stay(declared, text):
    assert move_boxes(text, declared=declared, size=(300, 500), geometry="pad") == text


def test_a_box_a_little_outside_the_image_is_cut_to_it():
    assert move_boxes("[-3, 0, 505, 300]", declared="pixel", size=(300, 500), geometry="squash") == (
        "[0.0, 0.0, 1.0, 1.0]"
    )


def test_a_box_that_the_crop_cuts_off_is_an_error_with_its_own_name():
    cut = "[0.0, 0.0, 0.2, 1.0]"  # of an image twice as wide as high, a quarter is cut off on either side
    with pytest.raises(CroppedAwayError, match=r"a\.json, record 3: the box \[0\.0, 0\.0, 0\.2, 1\.0\] lies outside"):
        move_boxes(cut, declared="unit", size=(100, 200), geometry="crop", where="a.json, record 3")
    assert issubclass(CroppedAwayError, RowError)
    assert move_boxes("[0.0, 0.0, 0.3, 1.0]", declared="unit", size=(100, 200), geometry="crop") == (
        "[0.0, 0.0, 0.1, 1.0]"
    )


def _row(messages: list, sizes: list, coordinates: str = "pixel", **more):
    media = [{"kind": "image", "path": "a.png", "height": height, "width": width} for height, width in sizes]
    fields = {"id": 1, "messages": messages, "media": media, "coordinates": coordinates, **more}
    return parse_row(fields, where="rows.jsonl, line 1", root=Path("."))


IMAGE = {"type": "image"}


def test_a_box_belongs_to_the_image_before_it():
    first, second = [IMAGE, {"type": "text", "text": "[0, 0, 100, 50]"}], [IMAGE, {"type": "text", "text": "and?"}]
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "[0, 0, 100, 50]", "loss": 0.5},
        {"role": "user", "content": second},
        {"role": "assistant", "content": "[0, 0, 100, 50]"},
    ]
    row = _row(messages, [(50, 100), (100, 200)])
    moved = move_row(row, "squash")
    assert moved.messages[0]["content"][1]["text"] == "[0.0, 0.0, 1.0, 1.0]"
    assert moved.messages[1] == {"role": "assistant", "content": "[0.0, 0.0, 1.0, 1.0]", "loss": 0.5}
    assert moved.messages[3]["content"] == "[0.0, 0.0, 0.5, 0.5]"
    assert move_row(moved, "squash") is moved  # nothing is left to move
    assert row.messages[1]["content"] == "[0, 0, 100, 50]"  # the row itself is as it was


def test_each_side_of_a_preference_moves_with_its_own_media():
    question = {"role": "user", "content": [IMAGE, {"type": "text", "text": "Where is it?"}]}
    own = [{"kind": "image", "path": "b.png", "height": 200, "width": 200}]
    row = _row(
        [question],
        [(100, 100)],
        chosen={"content": "[0, 0, 50, 100]"},
        rejected={"content": "[0, 0, 50, 100]", "media": own},
    )
    moved = move_row(row, "pad")
    assert moved.chosen.content == "[0.0, 0.0, 0.5, 1.0]"
    assert moved.rejected.content == "[0.0, 0.0, 0.25, 0.5]"
    assert moved.rejected.media == row.rejected.media


def test_rows_without_boxes_or_images_are_left_alone():
    plain = _row([{"role": "assistant", "content": "[0, 0, 50, 100]"}], [])
    undeclared = _row([{"role": "assistant", "content": [IMAGE]}], [(100, 100)], coordinates="")
    assert move_row(plain, None) is plain and move_row(undeclared, None) is undeclared
    with pytest.raises(OptionError, match="geometry is None"):
        move_row(_row([{"role": "assistant", "content": [IMAGE]}], [(100, 100)]), None)
