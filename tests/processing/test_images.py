"""Every picture of a valid type arrives upright in RGB; every other one is named, with its row and its fault."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from mllm.errors import MediaError
from mllm.processing import images
from mllm.processing.images import decode_image, image_size


def _bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _quarters(width: int = 8, height: int = 4) -> Image.Image:
    """Red top left, green top right, blue bottom left, white bottom right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_each_format_by_bytes_and_by_a_misleading_name(kind, tmp_path):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    data = _bytes(_quarters(32, 16), kind, **options)
    (tmp_path / "picture.txt").write_bytes(data)
    for source in (data, tmp_path / "picture.txt", str(tmp_path / "picture.txt")):
        image = decode_image(source)
        assert (image.mode, image.size) == ("RGB", (32, 16))
        assert image_size(source) == (16, 32)
        np.testing.assert_allclose(np.asarray(image), np.asarray(_quarters(32, 16)), atol=40 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_turns_pixels_and_size_alike(kind, orientation):
    """The corners stand where a viewer that obeys EXIF shows them."""
    turned = {  # top left, top right, bottom left, bottom right of the upright image, by their place in the file
        1: "rgbw", 2: "grwb", 3: "wbgr", 4: "bwrg", 5: "rbgw", 6: "brwg", 7: "wgbr", 8: "gwrb",
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = _bytes(_quarters(32, 16), kind, exif=exif, **options)
    image = decode_image(data)
    assert image.size == ((16, 32) if orientation >= 5 else (32, 16))
    assert image_size(data) == (image.height, image.width)
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    x, y = image.width - 4, image.height - 4
    corners = [image.getpixel(place) for place in ((3, 3), (x, 3), (3, y), (x, y))]
    assert "".join(names[tuple(round(value / 255) for value in corner)] for corner in corners) == turned


def test_an_opened_image_is_treated_like_its_file():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = _bytes(_quarters(32, 16), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        assert image_size(opened) == image_size(data) == (32, 16)
        assert np.array_equal(decode_image(opened), decode_image(data))
        assert opened.size == (32, 16)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (0, 255), (0, 0, 0)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("I;16", 256 * 200 + 7, (200, 200, 200)),
        ("I;16", 65535, (255, 255, 255)),
    ],
)
def test_modes_become_rgb(mode, colour, expected):
    assert decode_image(_bytes(Image.new(mode, (4, 4), colour))).getpixel((1, 1)) == expected


def test_cmyk_becomes_rgb():
    assert decode_image(_bytes(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")).getpixel((1, 1)) == (255, 255, 255)


def test_palette_with_transparency_lies_over_white():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 1)
    image = decode_image(_bytes(palette, transparency=0))
    assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == ((255, 0, 0), (255, 255, 255))


def test_transparent_colour_of_an_rgb_png_lies_over_white():
    data = _bytes(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    assert decode_image(data).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = _bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data).getpixel((2, 2)) == (255, 0, 0)


def test_faults_name_row_and_file(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture at all, but a text of some length")
    (tmp_path / "cut.jpg").write_bytes(_bytes(Image.effect_noise((64, 64), 50), "JPEG")[:-500])
    (tmp_path / "cut.png").write_bytes(_bytes(Image.effect_noise((64, 64), 50), "PNG")[:-500])
    faults = {
        "missing.png": "does not exist",
        "empty.png": "is empty",
        "text.png": "no image of a known type",
        "cut.jpg": "damaged or truncated JPEG",
        "cut.png": "damaged or truncated PNG",
        "": "is a directory",
    }
    for name, fault in faults.items():
        with pytest.raises(MediaError, match=fault) as caught:
            decode_image(tmp_path / name, where="row 7 of train.jsonl")
        assert caught.value.found.startswith("row 7 of train.jsonl: the image ")
        assert name in caught.value.found
    with pytest.raises(MediaError, match="is empty"):
        decode_image(b"")
    with pytest.raises(MediaError, match="no image of a known type"):
        image_size(b"%PDF-1.7 and so on", where="row 3")


def test_types_we_do_not_read_are_refused():
    with pytest.raises(MediaError, match="no image of a known type"):
        decode_image(_bytes(_quarters(), "PPM"))
    with pytest.raises(MediaError, match="floating-point"):
        decode_image(_bytes(Image.new("F", (4, 4)), "TIFF"))


@pytest.mark.parametrize("size", [(9000, 8000), (16_385, 100), (4000, 10)])
def test_too_large_is_told_from_the_header(size, monkeypatch):
    data = _bytes(Image.new("1", size))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded before the limits were checked"))
    for read in (decode_image, image_size):
        with pytest.raises(MediaError, match=f"{size[0]} x {size[1]} pixels"):
            read(data)


def test_size_is_read_without_decoding(monkeypatch):
    data = {kind: _bytes(_quarters(), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    monkeypatch.setattr(images.Image.Image, "load", lambda self: pytest.fail("decoded"))
    for content in data.values():
        assert image_size(content) == (4, 8)


def test_no_bytes_make_another_error_than_ours():
    """Headers and bodies damaged at random places."""
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = np.frombuffer(_bytes(_quarters(32, 16), kind), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            places = generator.integers(2, len(whole), 4)
            damaged[places] = generator.integers(0, 256, 4)
            try:
                assert decode_image(damaged.tobytes()).mode == "RGB"
            except MediaError as error:
                assert error.found.startswith("the image in memory")
