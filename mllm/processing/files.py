"""Media files as they lie on a disk: opened without blocking, and told by their first bytes."""

import errno
import io
import math
import os
import stat
import time
from pathlib import Path
from typing import Any

from mllm.errors import MediaError

HEAD_BYTES = 512
"""As many first bytes as `describe` wants to see."""

# What a file may begin with, at which byte. Longest first where one begins another.
_SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WEBP"),
    (8, b"WAVE", "WAV"),
    (8, b"AVI ", "AVI"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftypM4A", "M4A"),
    (4, b"ftypqt", "MOV"),
    (4, b"ftyp", "MP4"),
    (4, b"moov", "MOV"),
    (4, b"mdat", "MOV"),
    (0, b"\x1aE\xdf\xa3", "MKV"),
    (0, b"OggS", "OGG"),
    (0, b"fLaC", "FLAC"),
    (0, b"ID3", "MP3"),
    (0, b"FLV\x01", "FLV"),
    (0, b"\0\0\x01\xba", "MPEG"),
    (0, b"\0\0\x01\xb3", "MPEG"),
    (0, b"%PDF-", "PDF"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"\x1f\x8b", "GZIP"),
    (0, b"7z\xbc\xaf\x27\x1c", "7Z"),
    (0, b"Rar!\x1a\x07", "RAR"),
    (257, b"ustar", "TAR"),
    (0, b"BM", "BMP"),
)

_FAULTS = {
    errno.ENOENT: "does not exist",
    errno.ENOTDIR: "does not exist",
    errno.ELOOP: "is a loop of symbolic links",
    errno.EACCES: "may not be read",
    errno.EPERM: "may not be read",
    errno.ENAMETOOLONG: "has a name longer than file names may be",
}

_KINDS = (
    (stat.S_ISDIR, "is a directory"),
    (stat.S_ISFIFO, "is a pipe (FIFO)"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)


def open_file(path: str | Path, name: str, *, max_bytes: int) -> io.BufferedReader:
    """Open a regular file for reading; a pipe, a socket or a device is refused before it can block.

    Args:
        path: The file.
        name: How messages call it.
        max_bytes: Largest size allowed.

    Raises:
        MediaError: It is missing, no regular file, unreadable, empty or too large.
    """
    check_file(path, name, max_bytes=max_bytes)
    try:
        # Between the check and here somebody may have put a pipe in its place.
        return io.BufferedReader(TimedFile(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)))
    except OSError as error:
        raise _fault(path, name, error) from error


def check_file(path: str | Path, name: str, *, max_bytes: int) -> None:
    """Refuse what `open_file` refuses, for libraries that open files themselves.

    Raises:
        MediaError: It is missing, no regular file, empty or too large.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise _fault(path, name, error) from error
    except ValueError as error:
        raise MediaError(f"{name} has no possible file name", expected="a path", do="mend the path") from error
    if not stat.S_ISREG(found.st_mode):
        problem = next((words for test, words in _KINDS if test(found.st_mode)), "is no regular file")
        raise MediaError(f"{name} {problem}", expected="a regular file", do="mend the path, or drop the row")
    check_num_bytes(found.st_size, name, max_bytes=max_bytes)


def check_num_bytes(num_bytes: int, name: str, *, max_bytes: int) -> None:
    """Refuse no bytes, and too many.

    Raises:
        MediaError: It is empty or too large.
    """
    if num_bytes == 0:
        raise MediaError(f"{name} is empty", expected="a media file", do="fetch it again, or drop the row")
    if num_bytes > max_bytes:
        raise MediaError(
            f"{name} has {num_bytes:,} bytes",
            expected=f"at most {max_bytes:,}",
            do="make it smaller, cut it, or drop the row",
        )


def media_name(kind: str, source: object, where: str) -> str:
    """A media item as error messages call it, row first."""
    if isinstance(source, bytes):
        what = f"the {kind} in memory ({len(source)} bytes)"
    else:
        what = f"the {kind} {str(source)!r}"
    return f"{where}: {what}" if where else what


def signature(head: bytes) -> str:
    """The format whose signature a file begins with, such as "JPEG"; "" for none that we know."""
    for offset, magic, name in _SIGNATURES:
        if head.startswith(magic, offset):
            return "WEBM" if name == "MKV" and b"webm" in head[:64] else name
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06:
        return "MP3"  # a frame without a tag in front
    return ""


def describe(head: bytes) -> str:
    """What a file that is not what it should be holds, from its first bytes, as an error message says it."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, whose file was never fetched"
    if name := signature(head):
        return f"{'an' if name[0] in 'AM' and name != 'MKV' else 'a'} {name} file"
    if not head.strip(b"\0"):
        return "nothing but zero bytes"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<title")):
        return "an HTML page"
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing"
    if text.startswith(b"<html") or b"<html" in text:
        return "an HTML page"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML document"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return f"a text that begins with {head[:24].decode('utf-8', 'replace')!r}"
    return "data of an unknown kind"


class TooSlowError(OSError):
    """A `deadline` is over."""


class TimedFile(io.FileIO):
    """The raw half of a file that can be read until `deadline`, in seconds of this thread's processor time.

    Readers in Python take a header apart byte by byte, some in quadratic time; a crafted one would take hours.
    """

    deadline = math.inf

    def readinto(self, buffer: Any) -> int | None:
        _check_deadline(self.deadline)
        return super().readinto(buffer)


class TimedBytes(io.BytesIO):
    """As `TimedFile`, for bytes in memory."""

    deadline = math.inf

    def read(self, size: int | None = -1, /) -> bytes:
        _check_deadline(self.deadline)
        return super().read(size)


def _check_deadline(deadline: float) -> None:
    if time.thread_time() > deadline:
        raise TooSlowError


def _fault(path: str | Path, name: str, error: OSError) -> MediaError:
    problem = _FAULTS.get(error.errno or 0, f"cannot be read ({error.strerror})")
    if error.errno == errno.ENOENT and os.path.islink(path):
        problem = "is a symbolic link to a file that does not exist"
    do = "change its permissions" if problem == "may not be read" else "mend the path, or drop the row"
    return MediaError(f"{name} {problem}", expected="a readable file", do=do)
