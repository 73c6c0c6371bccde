"""Image files, bytes and PIL images to upright RGB images of a bounded size."""

import io
import struct
import zlib
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from mllm.errors import MediaError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")
MAX_PIXELS = 64_000_000
# Bounds for what a geometry makes of an image: padded to a square of its longest side, or its shortest side enlarged.
MAX_SIDE = 16_384
MAX_ASPECT_RATIO = 200

ImageSource = str | Path | bytes | Image.Image

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
        return _upright(_to_rgb(source, name), _orientation(source))
    with _open(source, name) as image:
        orientation = _orientation(image)
        try:
            image.load()
        except _DAMAGE as error:
            raise _damaged(name, image.format) from error
        rgb = _to_rgb(image, name)
    return _upright(rgb, orientation)


def image_size(source: ImageSource, *, where: str = "") -> tuple[int, int]:
    """Height and width of what `decode_image` returns, from the header alone.

    Raises:
        MediaError: As `decode_image`, but for damage behind the header.
    """
    name = _name(source, where)
    if isinstance(source, Image.Image):
        _check_limits(source, name)
        return _upright_size(source)
    with _open(source, name) as image:
        return _upright_size(image)


def _open(source: str | Path | bytes, name: str) -> Image.Image:
    if isinstance(source, bytes):
        if not source:
            raise MediaError(f"{name} is empty", expected="an image", do="mend or drop the row")
        stream: Path | io.BytesIO = io.BytesIO(source)
    else:
        stream = Path(source)
        if not stream.is_file():
            problem = "is a directory" if stream.is_dir() else "does not exist"
            raise MediaError(f"{name} {problem}", expected="an image file", do="mend the path, or drop the row")
        if stream.stat().st_size == 0:
            raise MediaError(f"{name} is empty", expected="an image file", do="fetch the file again, or drop the row")
    try:
        image = Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(f"{name} has more than twice the pixels that Pillow opens") from error
    except PermissionError as error:
        raise MediaError(f"{name} may not be read", expected="a readable file", do="change its permissions") from error
    except _DAMAGE as error:
        raise MediaError(
            f"{name} is no image of a known type, or its header is damaged",
            expected=f"one of {', '.join(FORMATS)}, told from the bytes, whatever the name says",
            do="convert the file to PNG or JPEG, fetch it again, or drop the row",
        ) from error
    try:
        _check_limits(image, name)
    except MediaError:
        image.close()
        raise
    return image


def _check_limits(image: Image.Image, name: str) -> None:
    longest, shortest = max(image.size), min(image.size)
    if longest * shortest > MAX_PIXELS or longest > MAX_SIDE or longest > MAX_ASPECT_RATIO * shortest:
        raise _too_large(f"{name} has {image.width} x {image.height} pixels")


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return image.size if _orientation(image) in _SWAPPED else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns it while loading, and its size already says so
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


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any mode to RGB; values of 16 bits keep their upper 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.mode == "F":
        raise MediaError(
            f"{name} holds floating-point values",
            expected="an image of 8 or 16 bits a channel",
            do="convert it to PNG",
        )
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _name(source: ImageSource, where: str) -> str:
    if isinstance(source, Image.Image):
        what = f"the {source.width} x {source.height} image in memory"
    elif isinstance(source, bytes):
        what = f"the image in memory ({len(source)} bytes)"
    else:
        what = f"the image {str(source)!r}"
    return f"{where}: {what}" if where else what


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
