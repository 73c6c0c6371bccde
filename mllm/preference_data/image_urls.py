"""Images as an endpoint takes them: inside the request, as data URLs."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mllm.errors import OptionError
from mllm.processing.images import ImageHeader, decode_image, image_header

_SENT_AS_IS = ("JPEG", "PNG", "WEBP", "GIF")
_JPEG_QUALITY = 92
_FEW_PIXELS = 256 * 256
"""Up to here a picture is sent without loss."""


def image_url(item: Mapping[str, Any], longest_side: int) -> dict[str, Any]:
    """A content item of a message, as `Chat` takes it, in the form of OpenAI's API.

    A file that is no larger is sent as it is; others are made smaller and upright.

    Raises:
        OptionError: It is no image.
        MediaError: It cannot be read.
    """
    if item["type"] != "image":
        raise OptionError(
            f"media of kind {item['type']}",
            expected="images: nothing else can be sent to an endpoint",
            do="complete these rows with a model at hand",
        )
    form, data = _file(item["image"], longest_side)
    return {"type": "image_url", "image_url": {"url": f"data:image/{form};base64,{base64.b64encode(data).decode()}"}}


def _file(source: Any, longest_side: int) -> tuple[str, bytes]:
    if not isinstance(source, Image.Image):
        source = source if isinstance(source, bytes) else Path(source)
        header = image_header(source)
        if _can_stay(header, longest_side):
            return header.format.lower(), source if isinstance(source, bytes) else source.read_bytes()
    image = decode_image(source)
    image.thumbnail((longest_side, longest_side))
    output = io.BytesIO()
    if image.width * image.height <= _FEW_PIXELS:
        image.save(output, "PNG")
        return "png", output.getvalue()
    image.save(output, "JPEG", quality=_JPEG_QUALITY)
    return "jpeg", output.getvalue()


def _can_stay(header: ImageHeader, longest_side: int) -> bool:
    is_small = max(header.height, header.width) <= longest_side
    return is_small and header.format in _SENT_AS_IS and not header.notes
