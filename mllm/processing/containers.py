"""Video and audio files opened with PyAV, under our limits. Runs in the decoders' process only."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from mllm.errors import MediaError
from mllm.processing.files import HEAD_BYTES, check_file, check_num_bytes, describe, open_file, signature

MAX_BYTES = 1 << 36
# Demuxers that read one file of media. Playlists and concatenations would open what the file names: other files, URLs.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,asf,mpeg,mpegts,mpegvideo,ogg,gif,wav,flac,mp3,aac,aiff,au,"
    "m4v,h264,hevc,rm,caf,w64,amr,ac3,eac3"
)
_MEDIA = ("MP4", "MOV", "MKV", "WEBM", "AVI", "FLV", "MPEG", "GIF", "WAV", "FLAC", "MP3", "OGG", "M4A", "AIFF")


@contextmanager
def open_container(source: Path | bytes, name: str, kind: str) -> Iterator[Any]:
    """A PyAV container; what PyAV raises inside becomes a `MediaError`.

    Args:
        source: The file, or its content.
        name: How messages call it.
        kind: "video" or "audio": which stream there must be.

    Raises:
        MediaError: It cannot be read, is of another kind, or damaged.
    """
    import av

    check_source(source, name)
    options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
    try:
        where = BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
        with av.open(where, container_options=options, metadata_errors="replace") as container:
            if not getattr(container.streams, kind):
                raise wrong_kind(source, name, kind)
            yield container
    except (av.FFmpegError, OSError, ValueError, OverflowError, ZeroDivisionError, StopIteration) as error:
        if isinstance(error, MediaError):
            raise
        raise wrong_kind(source, name, kind) from error


def check_source(source: Path | bytes, name: str) -> None:
    """Refuse what is no regular file, empty or too large.

    Raises:
        MediaError: It is.
    """
    if isinstance(source, bytes):
        check_num_bytes(len(source), name, max_bytes=MAX_BYTES)
    else:
        check_file(source, name, max_bytes=MAX_BYTES)


def wrong_kind(source: Path | bytes, name: str, kind: str) -> MediaError:
    """The error for a file that holds no readable stream of a kind."""
    head = first_bytes(source, name)
    if signature(head) in _MEDIA:
        found = f"{name} is {describe(head)} that holds no {kind}, or is damaged or cut off"
    else:
        found = f"{name} is no {kind} of a known type but {describe(head)}"
    return MediaError(
        found,
        expected=f"{kind} in one whole file, such as {'MP4, WebM or MKV' if kind == 'video' else 'WAV, FLAC or MP3'}",
        do="fetch it again, convert it, or drop the row",
    )


def first_bytes(source: Path | bytes, name: str) -> bytes:
    """As many bytes as `describe` wants to see."""
    if isinstance(source, bytes):
        return source[:HEAD_BYTES]
    with open_file(source, name, max_bytes=MAX_BYTES) as stream:
        return stream.read(HEAD_BYTES)
