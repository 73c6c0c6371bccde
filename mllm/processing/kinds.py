"""Which kind of media a file holds, told from its bytes: a browser's word for it, or a name, may be wrong."""

from pathlib import Path

from mllm.errors import MediaError
from mllm.processing.audio import audio_header
from mllm.processing.containers import first_bytes
from mllm.processing.files import describe, media_name, signature
from mllm.processing.video import video_header

_IMAGES = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "HEIC", "AVIF")
_SOUNDS = ("WAV", "FLAC", "MP3", "M4A")
_EITHER = ("MP4", "MOV", "MKV", "WEBM", "OGG", "AVI", "FLV", "MPEG", "")
"""Containers of pictures, of sound or of both; and what no signature tells, such as AAC without a container."""


def media_kind(source: Path | bytes, *, where: str = "") -> str:
    """Say whether a file is an "image", a "video" or, with sound and no pictures that move, "audio".

    Args:
        source: The file, or its content.
        where: Names the item in errors.

    Raises:
        MediaError: It cannot be read, or holds none of them.
    """
    name = media_name("file", source, where)
    head = first_bytes(source, name)
    form = signature(head)
    if form in _IMAGES:
        return "image"
    if form in _SOUNDS:
        return "audio"
    for kind, look in (("video", video_header), ("audio", audio_header)) if form in _EITHER else ():
        try:
            look(source, where=where)
        except MediaError:
            continue
        return kind
    raise MediaError(
        f"{name} holds no picture, sound or video that can be read, but {describe(head)}",
        expected="a picture (PNG, JPEG, ...), a sound (WAV, FLAC, MP3, ...) or a video (MP4, WebM, ...), whole",
        do="convert it, or send another one",
    )
