"""Small pictures of media, as a web page can hold them."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mllm.data.blobs import read_media_bytes
from mllm.data.coordinates import BOX_PATTERN
from mllm.data.schema import MediaItem
from mllm.errors import MediaError
from mllm.processing import MllmProcessor
from mllm.processing.audio import decode_audio
from mllm.processing.images import decode_image
from mllm.processing.video import decode_video
from mllm.sizes.sampling import Sampling

SIDE = 168
FRAMES = 4


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One media item on the page.

    Args:
        caption: File, size and length.
        pictures: `data:` URLs, as published; several of a video.
        seen: The square that the encoder sees, boxes of the text drawn in; "" without a processor or for other media.
        problem: Why there is no picture; "" if there is one.
    """

    caption: str
    pictures: tuple[str, ...] = ()
    seen: str = ""
    problem: str = ""


def thumbnail(item: MediaItem, processor: MllmProcessor | None = None, *, texts: tuple[str, ...] = ()) -> Thumbnail:
    """A media item in small.

    Args:
        item: An image, a video or a sound.
        processor: Shows, beside the image, what it makes of it.
        texts: Texts whose boxes, in shares of what is seen, are drawn in.
    """
    caption = _caption(item)
    try:
        images = _images(item)
    except MediaError as error:
        return Thumbnail(caption, problem=error.found)
    seen = ""
    if processor is not None and item.kind == "image" and processor.image_token is not None:
        seen = _data_url(draw_boxes(seen_image(images[0], processor), texts))
    return Thumbnail(caption, tuple(_data_url(image) for image in images), seen)


def seen_image(image: Image.Image, processor: MllmProcessor) -> Image.Image:
    """What the encoder gets of an image, its colours turned back."""
    settings = processor.image_processor
    pixels = processor.encode_images([image])[0].double().numpy().transpose(1, 2, 0)
    if settings.do_normalize:
        pixels = pixels * np.array(settings.image_std) + np.array(settings.image_mean)
    if settings.do_rescale:
        pixels = pixels / settings.rescale_factor
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def draw_boxes(image: Image.Image, texts: tuple[str, ...]) -> Image.Image:
    """The boxes that the texts hold, drawn onto an image of at least the thumbnail's size."""
    scale = max(1, SIDE // max(image.size))
    drawn = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(drawn)
    for text in texts:
        for match in BOX_PATTERN.finditer(text):
            left, top, right, bottom = (float(number) for number in match.groups())
            if 0 <= left <= right <= 1 and 0 <= top <= bottom <= 1:
                x, y = left * (drawn.width - 1), top * (drawn.height - 1)
                corners = (x, y, max(right * (drawn.width - 1), x), max(bottom * (drawn.height - 1), y))
                pen.rectangle(corners, outline=(255, 0, 200), width=max(2, drawn.width // 84))
    return drawn


def _images(item: MediaItem) -> list[Image.Image]:
    source = read_media_bytes(item)
    if item.kind == "image":
        return [decode_image(source)]
    if item.kind == "video":
        return decode_video(source, sampling=Sampling("uniform", frames=FRAMES), start=item.start, end=item.end).frames
    samples, _ = decode_audio(source, start=item.start, end=item.end, sampling_rate=8000)
    return [_waveform(samples)]


def _waveform(samples: np.ndarray) -> Image.Image:
    """Loudness over time."""
    image = Image.new("RGB", (2 * SIDE, SIDE // 2), (245, 245, 240))
    pen = ImageDraw.Draw(image)
    middle = image.height // 2
    for x, part in enumerate(np.array_split(samples, image.width)):
        height = round(float(np.abs(part).max(initial=0.0)) * (middle - 1))
        pen.line((x, middle - height, x, middle + height), fill=(50, 110, 160))
    return image


def _caption(item: MediaItem) -> str:
    if item.blob is not None:
        place = item.blob.column or f"byte {item.blob.offset:,}"
        name = f"{Path(item.blob.container).name} ({place}{f', row {item.blob.row}' if item.blob.column else ''})"
    else:
        name = str(item.path)
    facts = [f"{item.width} x {item.height}"] if item.height else []
    if item.seconds:
        facts.append(f"{item.seconds:.1f} s")
    if item.frames:
        facts.append(f"{item.frames} frames")
    if item.start is not None or item.end is not None:
        facts.append(f"cut from {item.start or 0:g} s to {'the end' if item.end is None else f'{item.end:g} s'}")
    return f"{item.kind} {name}{': ' if facts else ''}{', '.join(facts)}"


def _data_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((2 * SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, "PNG" if small.width * small.height < 4096 else "JPEG", quality=85)
    kind = "png" if stream.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
