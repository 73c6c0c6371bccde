"""Image files, bytes and PIL images to upright RGB images of a bounded size."""

import io
import math
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mllm.errors import MediaError
from mllm.processing.decode_limit import with_time_limit
from mllm.processing.files import (
    HEAD_BYTES,
    TimedBytes,
    TooSlowError,
    check_num_bytes,
    describe,
    media_name,
    open_file,
    signature,
)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")
_READERS = tuple(name for name in FORMATS if name != "MPO")  # several JPEGs in one file; Pillow's JPEG reader tells
MAX_PIXELS = 64_000_000
# Bounds for what a geometry makes of an image: padded to a square of its longest side, or its shortest side enlarged.
MAX_SIDE = 16_384
MAX_ASPECT_RATIO = 200
MAX_BYTES = 1 << 29
MAX_HEADER_SECONDS = 2.0
MAX_DECODE_SECONDS = 20.0
"""Of processor time, except for `_WHOLE`, which are decoded by the clock."""
EXTREME_ASPECT_RATIO = 10
"""From here on an audit names a ratio of sides: little of such an image is left in a square."""

ImageSource = str | Path | bytes | Image.Image

# Pillow reads most formats in blocks, between which we look at the time. Blocks are small because a progressive JPEG
# can hold a scan of 64 million pixels, 20 ms of work, in 90 bytes.
_BLOCK = 1 << 13
# The decoders of these take everything at once and cannot be stopped, so they run in a process that can. It would do
# for all formats, but takes up to three times as long as decoding a small JPEG here.
_WHOLE = ("WEBP", "TIFF")

# What Pillow's readers raise on damaged data.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, AttributeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

_SWAPPED = (5, 6, 7, 8)  # EXIF orientations that lie on their side


def decode_image(source: ImageSource, *, where: str = "") -> Image.Image:
    """Read one image as RGB, upright, transparency over white, the first frame of several.

    The type is told from the bytes, never from the name. Orientation is read from the header; a PNG that states it
    behind its pixels is taken as it lies.

    Args:
        source: A file's path, its content, or an image that somebody has opened (which is left as it is).
        where: Names the row in errors.

    Raises:
        MediaError: There is no such file, it is no image of a known type, it is damaged, or larger than the limits.
    """
    name = _name(source, where)
    if isinstance(source, Image.Image):
        _check_limits(source, name)
        return _upright(_to_rgb(source), _orientation(source))
    with _open(source, name) as image:
        if image.format not in _WHOLE:
            return _load(image, name)
    source = source if isinstance(source, bytes) else Path(source)
    return Image.fromarray(with_time_limit(_load_apart, source, name, seconds=MAX_DECODE_SECONDS, name=name))


def _load_apart(source: Path | bytes, name: str) -> np.ndarray:
    with _open(source, name) as image:
        return np.asarray(_load(image, name))


def _load(image: Image.Image, name: str) -> Image.Image:
    orientation = _orientation(image)
    image.decodermaxblock = _BLOCK  # type: ignore[attr-defined]
    try:
        image.load()
    except TooSlowError as error:
        raise _too_slow(name, "", MAX_DECODE_SECONDS) from error
    except _DAMAGE as error:
        raise _damaged(name, image.format) from error
    return _upright(_to_rgb(image), orientation)


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image file's header says.

    Args:
        height: Of what `decode_image` returns, in pixels.
        width: In pixels.
        format: One of `FORMATS`.
        notes: What an audit would name, such as "CMYK", "16-bit", "palette", "alpha", "animated" or "exif rotation".
    """

    height: int
    width: int
    format: str
    notes: tuple[str, ...]


def image_size(source: ImageSource, *, where: str = "") -> tuple[int, int]:
    """Height and width of what `decode_image` returns, from the header alone.

    Raises:
        MediaError: As `decode_image`, but for damage behind the header.
    """
    if isinstance(source, Image.Image):
        _check_limits(source, _name(source, where))
        return _upright_size(source)
    with _open(source, _name(source, where)) as image:
        return _upright_size(image)


def image_header(source: str | Path | bytes, *, where: str = "") -> ImageHeader:
    """Size, format and oddities of an image, from its header alone.

    Raises:
        MediaError: As `image_size`.
    """
    with _open(source, _name(source, where)) as image:
        height, width = _upright_size(image)
        return ImageHeader(height, width, image.format or "", tuple(_notes(image)))


@contextmanager
def _open(source: str | Path | bytes, name: str) -> Iterator[Image.Image]:
    stream: Any  # both have a deadline, one in its raw half
    if isinstance(source, bytes):
        check_num_bytes(len(source), name, max_bytes=MAX_BYTES)
        timed = stream = TimedBytes(source)
    else:
        stream = open_file(source, name, max_bytes=MAX_BYTES)
        timed = stream.raw
    with stream:
        timed.deadline = time.thread_time() + MAX_HEADER_SECONDS
        try:
            image = Image.open(stream, formats=_READERS)
        except Image.DecompressionBombError as error:
            raise _too_large(f"{name} has more than twice the pixels that Pillow opens") from error
        except TooSlowError as error:
            raise _too_slow(name, "the header of ", MAX_HEADER_SECONDS) from error
        except _DAMAGE as error:
            timed.deadline = math.inf
            raise _unknown(stream, name) from error
        timed.deadline = time.thread_time() + MAX_DECODE_SECONDS
        with image:
            _check_limits(image, name)
            yield image


def _notes(image: Image.Image) -> Iterator[str]:
    rawmode = _rawmode(image)
    if image.mode == "CMYK":
        yield "CMYK"
    if "16" in rawmode or image.mode.startswith("I"):
        yield "16-bit"
    if image.mode in ("P", "PA"):
        yield "palette"
    if image.has_transparency_data:
        yield "alpha"
    if image.format in ("GIF", "WEBP", "PNG") and image.is_animated:  # type: ignore[attr-defined]
        yield "animated"
    if image.format == "TIFF" and image.is_animated:  # type: ignore[attr-defined]
        yield "several pages"
    if _stated_orientation(image) in range(2, 9):
        yield "exif rotation"
    if max(image.size) > EXTREME_ASPECT_RATIO * min(image.size):
        yield "extreme aspect"


def _rawmode(image: Image.Image) -> str:
    """How the pixels lie in the file; modes of PIL cannot say that a colour has 16 bits."""
    arguments = image.tile[0].args if image.tile else ""  # type: ignore[attr-defined]
    if isinstance(arguments, tuple):
        arguments = arguments[0]
    return arguments if isinstance(arguments, str) else ""


def _check_limits(image: Image.Image, name: str) -> None:
    longest, shortest = max(image.size), min(image.size)
    if longest * shortest > MAX_PIXELS or longest > MAX_SIDE or longest > MAX_ASPECT_RATIO * shortest:
        raise _too_large(f"{name} has {image.width} x {image.height} pixels")
    if image.mode == "F":
        raise MediaError(
            f"{name} holds floating-point values",
            expected="an image of 8 or 16 bits a channel",
            do="convert it to PNG",
        )


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return image.size if _orientation(image) in _SWAPPED else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """How the pixels lie that Pillow loads."""
    # Pillow turns a TIFF while loading, and its size already says so.
    return 1 if image.format == "TIFF" else _stated_orientation(image)


def _stated_orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # asking would decode the pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGE:
        return 1  # EXIF data that cannot be read are as good as none
    return orientation if isinstance(orientation, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation not in range(2, 9):
        return image
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; values of 16 bits keep their upper 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _name(source: ImageSource, where: str) -> str:
    if not isinstance(source, Image.Image):
        return media_name("image", source, where)
    what = f"the {source.width} x {source.height} image in memory"
    return f"{where}: {what}" if where else what


def _unknown(stream: io.BufferedIOBase, name: str) -> MediaError:
    stream.seek(0)
    head = stream.read(HEAD_BYTES)
    if signature(head) in FORMATS:
        found = f"{name} is a {signature(head)} whose header is damaged, cut off or of a kind that Pillow cannot read"
    else:
        found = f"{name} is no image of a known type but {describe(head)}"
    return MediaError(
        found,
        expected=f"one of {', '.join(FORMATS)}, told from the bytes, whatever the name says",
        do="convert the file to PNG or JPEG, fetch it again, or drop the row",
    )


def _too_slow(name: str, part: str, seconds: float) -> MediaError:
    return MediaError(
        f"{name}: {part}the image takes more than {seconds:g} seconds to decode",
        expected="an image that can be decoded in time",
        do="convert it to PNG or JPEG anew, or drop the row",
    )


def _damaged(name: str, kind: str | None) -> MediaError:
    return MediaError(
        f"{name} is a damaged or truncated {kind}",
        expected="complete data",
        do="fetch the file again, or drop the row",
    )


def _too_large(found: str) -> MediaError:
    return MediaError(
        found,
        expected=f"at most {MAX_PIXELS:,} pixels, {MAX_SIDE:,} on a side, and sides of at most 1:{MAX_ASPECT_RATIO}",
        do="make it smaller, or drop the row",
    )
