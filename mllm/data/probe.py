"""Sizes and oddities of media files, read from their headers."""

from dataclasses import dataclass
from pathlib import Path

from mllm.processing.audio import audio_header
from mllm.processing.images import image_header
from mllm.processing.video import video_header

_SUFFIXES = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".gif": "GIF", ".webp": "WEBP",
    ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".mp4": "MP4", ".m4v": "MP4", ".mov": "MOV", ".webm": "WEBM",
    ".mkv": "MKV", ".avi": "AVI", ".wav": "WAV", ".flac": "FLAC", ".mp3": "MP3", ".ogg": "OGG", ".m4a": "M4A",
}  # fmt: skip
_ALIKE = {"MPO": "JPEG", "MOV": "MP4", "M4A": "MP4", "WEBM": "MKV"}  # one form under two names


@dataclass(frozen=True, slots=True)
class MediaFacts:
    """What a media file's header says.

    Args:
        height: Of an image or a frame as seen, in pixels: orientation and rotation applied. 0 for audio.
        width: In pixels.
        frames: Of a video; 0 if its header does not say.
        seconds: Length of audio or video; 0.0 if its header does not say.
        format: Such as "JPEG", "MP4" or "WAV", told from the bytes.
        notes: What an audit would name: "gif named .jpg", "CMYK", "16-bit", "animated", "exif rotation" and so on.
    """

    height: int = 0
    width: int = 0
    frames: int = 0
    seconds: float = 0.0
    format: str = ""
    notes: tuple[str, ...] = ()


def probe_media(kind: str, source: Path | bytes, *, where: str = "") -> MediaFacts:
    """Read the header of a media file.

    Nothing blocks: pipes, sockets and devices are refused unopened, and libraries that might hang on a header run in a
    process that is killed when its time is over.

    Args:
        kind: "image", "audio" or "video".
        source: The file, or its content.
        where: Names the row in errors.

    Raises:
        MediaError: It cannot be read, is of another kind, damaged in its header, or over a limit.
    """
    if kind == "image":
        image = image_header(source, where=where)
        notes = _misnamed(source, image.format) + image.notes
        return MediaFacts(image.height, image.width, format=image.format, notes=notes)
    if kind == "video":
        video = video_header(source, where=where)
        notes = _misnamed(source, video.format) + video.notes
        return MediaFacts(video.height, video.width, video.frames, video.seconds, video.format, notes)
    audio = audio_header(source, where=where)
    notes = _misnamed(source, audio.format) + audio.notes
    return MediaFacts(seconds=audio.seconds, format=audio.format, notes=notes)


def _misnamed(source: Path | bytes, found: str) -> tuple[str, ...]:
    if isinstance(source, bytes):
        return ()
    named = _SUFFIXES.get(source.suffix.lower(), found)
    if _ALIKE.get(named, named) == _ALIKE.get(found, found):
        return ()
    return (f"{found.lower()} named {source.suffix.lower()}",)
