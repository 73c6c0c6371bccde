"""How a text form names media: by paths. Embedded media become files, if there is a directory for them."""

import hashlib
import os
from pathlib import Path

from mllm.data.blobs import read_media_bytes
from mllm.data.schema import MediaItem
from mllm.data.writers.report import Unsayable

EMBEDDED = "embedded media, and no directory to put them into"
CUT = "a cut of an audio or video file"

# Beginnings of files and what such files are called. Readers here tell types from bytes; readers elsewhere may not.
_SUFFIXES = (
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"\x89PNG", ".png"),
    (0, b"GIF8", ".gif"),
    (8, b"WEBP", ".webp"),
    (8, b"WAVE", ".wav"),
    (8, b"AVI ", ".avi"),
    (0, b"BM", ".bmp"),
    (0, b"II*\x00", ".tif"),
    (0, b"MM\x00*", ".tif"),
    (0, b"fLaC", ".flac"),
    (0, b"OggS", ".ogg"),
    (0, b"ID3", ".mp3"),
    (0, b"\xff\xfb", ".mp3"),
    (4, b"ftyp", ".mp4"),
    (0, b"\x1a\x45\xdf\xa3", ".webm"),
)


class MediaFiles:
    """Names media files in what is written.

    Args:
        root: Paths under it are written relative to it, others in full.
        embedded: Where embedded media become files, named by their content; None if rows with such are unsayable.
    """

    def __init__(self, root: Path, *, embedded: Path | None = None):
        self._root = os.path.join(os.path.abspath(root), "")
        self._embedded = embedded

    def path(self, item: MediaItem) -> str:
        """The path to write, for forms that name whole files.

        Raises:
            Unsayable: The item is a cut of a file, or embedded with nowhere to go.
        """
        if item.start is not None or item.end is not None:
            raise Unsayable(CUT)
        return self.shortened(item.path) if item.path is not None else self.shortened(self._write(item))

    def shortened(self, path: Path) -> str:
        """A path as it is written."""
        return os.path.abspath(path).removeprefix(self._root)

    def _write(self, item: MediaItem) -> Path:
        if self._embedded is None:
            raise Unsayable(EMBEDDED)
        data = read_media_bytes(item)
        assert isinstance(data, bytes), "an item without a path has bytes"
        path = self._embedded / (hashlib.sha256(data).hexdigest()[:32] + suffix_of(data))
        if not path.exists():
            self._embedded.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
            partial.write_bytes(data)
            partial.rename(path)
        return path


def suffix_of(data: bytes) -> str:
    """What a file with these bytes is called; "" if nobody knows."""
    return next((suffix for offset, mark, suffix in _SUFFIXES if data[offset:].startswith(mark)), "")
