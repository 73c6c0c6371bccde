"""Files that no reader should trust, and a few good ones beside them. Built without downloads, the same every time."""

import io
import os
import socket
import struct
import wave
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

PUZZLES = {
    # name: (kind of the media item, what the reason must say)
    "absent.png": ("image", "not exist|missing|not there"),
    "folder.png": ("image", "directory"),
    "empty.png": ("image", "empty"),
    "page.jpg": ("image", "no image|HTML"),
    "noise.jpg": ("image", "no image|damaged"),
    "words.png": ("image", "no image|damaged"),
    "pointer.jpg": ("image", "no image|LFS"),
    "drawing.png": ("image", "no image|damaged"),
    "paper.jpg": ("image", "no image|damaged"),
    "script.eps": ("image", "no image|damaged"),
    "archive.png": ("image", "no image|damaged"),
    "one_byte.png": ("image", "no image|damaged"),
    "magic_only.png": ("image", "no image|damaged"),
    "half_header.png": ("image", "no image|damaged"),
    "half_header.jpg": ("image", "no image|damaged"),
    "half_header.gif": ("image", "no image|damaged"),
    "half_header.webp": ("image", "no image|damaged"),
    "half_header.bmp": ("image", "no image|damaged"),
    "half_header.tif": ("image", "no image|damaged"),
    "no_size.png": ("image", "no image|damaged|pixels"),
    "wrong_sum.png": ("image", "no image|damaged"),
    "bomb.png": ("image", "pixels"),
    "bomb_header.png": ("image", "pixels"),
    "wide.png": ("image", "pixels"),
    "negative.bmp": ("image", "no image|damaged|pixels"),
    "looping.tif": ("image", "no image|damaged|pixels"),
    "pipe.png": ("image", "pipe|FIFO|regular|not exist"),
    "socket.png": ("image", "socket|regular|not exist"),
    "loop.png": ("image", "loop|symbolic|not exist"),
    "dangling.png": ("image", "not exist|missing|symbolic"),
    "to_device.png": ("image", "device|regular|outside|not exist|leaves"),
    "sound.png": ("image", "no image|damaged"),
    "empty.wav": ("audio", "empty"),
    "words.wav": ("audio", "no audio|sound|damaged|cannot"),
    "picture.wav": ("audio", "no audio|sound|damaged|cannot"),
    "half_header.wav": ("audio", "no audio|sound|damaged|cannot"),
    "absent.wav": ("audio", "not exist|missing|not there"),
    "pipe.wav": ("audio", "pipe|FIFO|regular|not exist"),
    "folder.wav": ("audio", "directory"),
    "empty.mp4": ("video", "empty"),
    "words.mp4": ("video", "no video|damaged|cannot|not a video"),
    "picture_only_header.mp4": ("video", "no video|damaged|cannot|not a video"),
    "page.mp4": ("video", "no video|damaged|cannot|not a video|HTML"),
    "sound.mp4": ("video", "no video|damaged|cannot|not a video"),
    "no_index.mp4": ("video", "no video|damaged|cannot|not a video"),
    "playlist.mp4": ("video", "no video|damaged|cannot|not a video|seconds"),
    "concat.mp4": ("video", "no video|damaged|cannot|not a video|seconds"),
    "pipe.mp4": ("video", "pipe|FIFO|regular|not exist"),
    "loop.mp4": ("video", "loop|symbolic|not exist"),
    "absent.mp4": ("video", "not exist|missing|not there"),
}
"""Media that the index refuses, from the header alone."""

ODD_BUT_GOOD = {
    "good.png": (40, 30),
    "gif_named.jpg": (12, 16),
    "cmyk.jpg": (20, 24),
    "sixteen_bit.png": (10, 14),
    "animated.gif": (16, 16),
    "turned.jpg": (30, 20),  # 20 x 30 on disk, lying on its side
    "palette.png": (9, 9),
    "no_suffix": (11, 13),
    "blank in name.png": (8, 8),
    "naïve-猫.png": (8, 9),
}
"""Images that are as they should not be, and can be read: height and width as seen."""

FOUND_BY_DECODING = ("truncated.png", "truncated.jpg", "bad_pixels.png")
"""Images whose headers are right and whose pixels are not there."""


def write_media(root: Path) -> None:
    """Fill a directory with the media above, and put one good image outside it, beside it: `../outside.png`."""
    root.mkdir(parents=True)
    _write_good(root)
    _write_images(root)
    _write_special(root)
    _write_sounds(root)
    _write_videos(root)


def picture(height: int = 40, width: int = 30, seed: int = 0) -> Image.Image:
    """A picture that does not compress to nothing."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """An image file's content."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    """A grey PNG that says it is of this size, whatever its pixel data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data or b"")), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _write_good(root: Path) -> None:
    for name in ("good.png", "blank in name.png", "naïve-猫.png", "no_suffix"):
        (root / name).write_bytes(encoded(picture(*ODD_BUT_GOOD[name]), "PNG"))
    (root / "gif_named.jpg").write_bytes(encoded(picture(12, 16), "GIF"))
    (root / "cmyk.jpg").write_bytes(encoded(picture(20, 24).convert("CMYK"), "JPEG"))
    deep = np.random.default_rng(0).integers(0, 65535, (10, 14), dtype=np.uint16)
    (root / "sixteen_bit.png").write_bytes(encoded(Image.fromarray(deep), "PNG"))
    frames = [picture(16, 16, seed) for seed in range(3)]
    (root / "animated.gif").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "turned.jpg").write_bytes(encoded(picture(20, 30), "JPEG", exif=exif))
    (root / "palette.png").write_bytes(encoded(picture(9, 9).convert("P"), "PNG", transparency=0))
    (root.parent / "outside.png").write_bytes(encoded(picture(), "PNG"))


def _write_images(root: Path) -> None:
    whole_png, whole_jpg = encoded(picture(), "PNG"), encoded(picture(), "JPEG")
    contents = {
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>",
        "noise.jpg": np.random.default_rng(7).bytes(5000),
        "words.png": b"just some words\n" * 10,
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "paper.jpg": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n(x) run\n",
        "archive.png": b"PK\x03\x04" + bytes(60),
        "one_byte.png": b"\x89",
        "magic_only.png": whole_png[:8],
        "half_header.png": whole_png[:20],
        "half_header.jpg": whole_jpg[:30],
        "half_header.gif": encoded(picture(), "GIF")[:9],
        "half_header.webp": encoded(picture(), "WEBP")[:14],
        "half_header.bmp": encoded(picture(), "BMP")[:20],
        "half_header.tif": encoded(picture(), "TIFF")[:9],
        "no_size.png": png(0, 0),
        "wrong_sum.png": whole_png[:29] + b"\0\0\0\0" + whole_png[33:],
        "bomb.png": png(50_000, 50_000, bytes(50_001 * 40)),
        "bomb_header.png": png(50_000, 50_000),
        "wide.png": png(9000, 3, bytes(9001 * 3)),
        "negative.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, -5, -5, 1, 24, 0, 0, 0, 0, 0, 0),
        # Its directory of tags is followed by itself.
        "looping.tif": b"II*\0" + struct.pack("<IHHHIII", 8, 1, 259, 3, 1, 1, 8),
        "truncated.png": whole_png[: len(whole_png) // 2],
        "truncated.jpg": whole_jpg[: len(whole_jpg) * 2 // 3],
        "bad_pixels.png": png(30, 30, b"too few"),
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)


def _write_special(root: Path) -> None:
    for name in ("folder.png", "folder.wav"):
        (root / name).mkdir()
    for name in ("pipe.png", "pipe.wav", "pipe.mp4", "pipe.ts"):
        os.mkfifo(root / name)
    _bind_socket(root, "socket.png")
    for name in ("loop.png", "loop.mp4"):
        (root / name).symlink_to(name)
    (root / "dangling.png").symlink_to("nowhere.png")
    (root / "to_device.png").symlink_to("/dev/zero")


def _bind_socket(root: Path, name: str) -> None:
    """A socket's path may have about a hundred letters, so the name is bound from inside the directory."""
    before = Path.cwd()
    os.chdir(root)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
    finally:
        os.chdir(before)


def _write_sounds(root: Path) -> None:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(bytes(3200))
    whole = stream.getvalue()
    for name in ("good.wav", "sound.png"):
        (root / name).write_bytes(whole)
    (root / "empty.wav").write_bytes(b"")
    (root / "words.wav").write_bytes(b"just some words\n" * 10)
    (root / "picture.wav").write_bytes(encoded(picture(), "PNG"))
    (root / "half_header.wav").write_bytes(whole[:30])


def _write_videos(root: Path) -> None:
    box = struct.pack(">I4s4sI4s", 24, b"ftyp", b"isom", 512, b"isom") + b"mp42"
    contents = {
        "empty.mp4": b"",
        "words.mp4": b"just some words\n" * 10,
        "picture_only_header.mp4": b"\xff\xd8\xff\xe0",
        "page.mp4": b"<!DOCTYPE html><html><body>gone</body></html>",
        "sound.mp4": (root / "good.wav").read_bytes(),
        # All frames and no table that says where they are: the download was cut.
        "no_index.mp4": box + struct.pack(">I4s", 100_008, b"mdat") + np.random.default_rng(3).bytes(100_000),
        # Playlists that send a decoder to a pipe into which nobody writes: it waits for ever.
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\npipe.ts\n#EXT-X-ENDLIST\n",
        "concat.mp4": b"ffconcat version 1.0\nfile pipe.ts\n",
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)
