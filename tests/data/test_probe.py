"""Headers are read without blocking; sizes are those of the decoded media, and every fault and oddity has its name."""

import io
import os
import runpy
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import ExifTags, Image

from mllm.data.probe import MediaFacts, probe_media
from mllm.errors import MediaError
from mllm.processing import images
from mllm.processing.images import decode_image, image_size
from mllm.processing.video import decode_video
from mllm.sizes.sampling import Sampling

files = runpy.run_path(str(Path(__file__).parents[1] / "media_files.py"))


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _picture(mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> Image.Image:
    return Image.effect_noise(size, 60).convert(mode)


def _save(path: Path, image: Image.Image, form: str, **options) -> Path:
    image.save(path, form, **options)
    return path


def _rgb16(path: Path) -> Path:
    """A PNG of 16 bits a colour, which Pillow shows as an RGB image like any other."""
    rows = b"".join(b"\0" + bytes(12 * 6) for _ in range(9))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 12, 9, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def _images(folder: Path) -> dict[Path, tuple[str, ...]]:
    """Files and the notes on them."""
    frames = {"save_all": True, "append_images": [_picture("RGB")]}
    return {
        _save(folder / "a.jpg", _picture(), "JPEG"): (),
        _save(folder / "a.JPEG", _picture("L"), "JPEG"): (),
        _save(folder / "a.png", _picture(), "PNG"): (),
        _save(folder / "a.webp", _picture(), "WEBP"): (),
        _save(folder / "a.bmp", _picture(), "BMP"): (),
        _save(folder / "a", _picture(), "PNG"): (),
        _save(folder / "b.jpg", _picture("P"), "GIF"): ("gif named .jpg", "palette"),
        _save(folder / "b.png", _picture(), "JPEG"): ("jpeg named .png",),
        _save(folder / "cmyk.jpg", _picture("CMYK"), "JPEG"): ("CMYK",),
        _save(folder / "deep.png", Image.new("I;16", (8, 4), 999), "PNG"): ("16-bit",),
        _rgb16(folder / "deep_rgb.png"): ("16-bit",),
        _save(folder / "alpha.png", _picture("RGBA"), "PNG"): ("alpha",),
        _save(folder / "palette.png", _picture("P"), "PNG"): ("palette",),
        _save(folder / "moving.gif", _picture("P"), "GIF", **frames): ("palette", "animated"),
        _save(folder / "moving.webp", _picture(), "WEBP", **frames): ("animated",),
        _save(folder / "moving.png", _picture(), "PNG", **frames): ("animated",),
        _save(folder / "pages.tif", _picture(), "TIFF", **frames): ("several pages",),
        _save(folder / "turned.jpg", _picture(), "JPEG", exif=_exif(6)): ("exif rotation",),
        _save(folder / "mirrored.png", _picture(), "PNG", exif=_exif(2)): ("exif rotation",),
        _save(folder / "turned.tif", _picture(), "TIFF", exif=_exif(8)): ("exif rotation",),
        _save(folder / "wide.png", _picture(size=(101, 10)), "PNG"): ("extreme aspect",),
    }


def test_image_facts_are_those_of_the_decoded_image(tmp_path):
    for path, notes in _images(tmp_path).items():
        facts = probe_media("image", path)
        decoded = decode_image(path)
        assert (facts.width, facts.height) == decoded.size, path
        assert (facts.height, facts.width) == image_size(path)
        assert facts.notes == notes, path
        assert (facts.frames, facts.seconds) == (0, 0.0)
        in_memory = probe_media("image", path.read_bytes())
        assert in_memory.format == facts.format
        assert in_memory.notes == tuple(note for note in notes if " named " not in note)


def test_video_and_audio_facts_are_those_of_the_decoded_media(tmp_path):
    times = [number / 10 for number in range(20)]
    video = files["write_video"](tmp_path / "a.mp4", times=times, sound=True)
    lying = files["turn"](video, 90, tmp_path / "b.avi")
    frame = decode_video(video, sampling=Sampling("uniform", frames=1)).frames[0]
    facts = probe_media("video", video)
    assert (facts.width, facts.height, facts.frames, facts.format, facts.notes) == (*frame.size, 20, "MP4", ())
    assert facts.seconds == pytest.approx(2.0, abs=0.11)
    turned = probe_media("video", lying)
    assert (turned.height, turned.width, turned.notes) == (*frame.size, ("mp4 named .avi", "rotation"))
    sound = probe_media("audio", video)
    assert (sound.height, sound.frames, sound.format) == (0, 0, "MP4")
    assert sound.seconds == pytest.approx(2.0, abs=0.2)
    soundfile.write(tmp_path / "a.flac", np.zeros(8000), 16_000)
    (tmp_path / "a.mp3").write_bytes((tmp_path / "a.flac").read_bytes())
    assert probe_media("audio", tmp_path / "a.flac") == MediaFacts(seconds=0.5, format="FLAC")
    assert probe_media("audio", tmp_path / "a.mp3").notes == ("flac named .mp3",)


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_what_is_no_regular_file_is_refused_unopened(kind, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "to_fifo").symlink_to(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    faults = {
        tmp_path / "fifo": "is a pipe",
        tmp_path / "to_fifo": "is a pipe",
        tmp_path: "is a directory",
        tmp_path / "loop": "is a loop of symbolic links",
        tmp_path / "dangling": "is a symbolic link to a file that does not exist",
        tmp_path / "absent": "does not exist",
        tmp_path / "empty" / "below": "does not exist",
        tmp_path / "empty": "is empty",
        Path("/dev/zero"): "is a device",
        tmp_path / ("x" * 300): "has a name longer",
        Path("a\0b"): "has no possible file name",
    }
    with socket.socket(socket.AF_UNIX) as ear:
        here = os.getcwd()
        os.chdir(tmp_path)  # names of sockets are short
        try:
            ear.bind("socket")
        finally:
            os.chdir(here)
        for path, fault in {**faults, tmp_path / "socket": "is a socket"}.items():
            with pytest.raises(MediaError, match=fault) as caught:
                probe_media(kind, path, where="row 7")
            assert caught.value.found.startswith(f"row 7: the {kind} ")
    with pytest.raises(MediaError, match="is empty"):
        probe_media(kind, b"")


def test_a_file_that_may_not_be_read_says_so(tmp_path):
    path = _save(tmp_path / "a.png", _picture(), "PNG")
    path.chmod(0)
    is_root = os.getuid() == 0  # whom permissions do not bind: be somebody else for a moment
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(MediaError, match="may not be read"):
            probe_media("image", path)
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_what_was_fetched_instead_of_the_media_has_its_name(kind, tmp_path):
    contents = {
        b"<!DOCTYPE html>\n<html><head><title>404</title>": "an HTML page",
        b'\xef\xbb\xbf  <HTML lang="en">': "an HTML page",
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "an XML document",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n": "a Git LFS pointer",
        b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(90): "a ZIP file",
        b"\x1f\x8b\x08\0" + bytes(90): "a GZIP file",
        b"%PDF-1.7 and so on": "a PDF file",
        b'{"error": "rate limit"}': "a text that begins with",
        bytes(4096): "nothing but zero bytes",
    }
    for content, words in contents.items():
        path = tmp_path / ("a.jpg" if kind == "image" else "a.mp4")
        path.write_bytes(content)
        for source in (path, content):
            with pytest.raises(MediaError, match=f"is no {kind} of a known type but {words}"):
                probe_media(kind, source)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_cut_headers_say_of_what(form):
    stream = io.BytesIO()
    _picture().save(stream, form)
    with pytest.raises(MediaError, match=f"is a {form} whose header is damaged, cut off"):
        probe_media("image", stream.getvalue()[:15])


def _chunks(name: bytes, count: int) -> bytes:
    chunk = struct.pack(">I", 3) + name + b"a\0b"
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    header = b"IHDR" + struct.pack(">IIBBBBB", 10, 10, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + chunk * count
    )


def test_headers_that_do_not_end_cost_little(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_HEADER_SECONDS", 0.1)
    endless = {
        "a.jpg": b"\xff\xd8\xff" + b"\xff" * 20_000_000,
        "a.png": _chunks(b"tEXt", 1_000_000),
        "a.gif": b"GIF89a" + struct.pack("<HH", 10, 10) + bytes(3) + b"\x21\xfe\x01a\0" * 2_000_000,
    }
    for name, content in endless.items():
        (tmp_path / name).write_bytes(content)
        for source in (tmp_path / name, content):
            begin = time.thread_time()
            with pytest.raises(MediaError, match="the header of the image takes more than 0.1 seconds"):
                probe_media("image", source)
            assert time.thread_time() - begin < 2


def test_a_jpeg_of_endless_scans_is_given_up(monkeypatch):
    stream = io.BytesIO()
    Image.new("L", (1000, 1000), 128).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    scan, end = data[data.rindex(b"\xff\xda") : -2], data[-2:]
    monkeypatch.setattr(images, "MAX_DECODE_SECONDS", 0.1)
    begin = time.thread_time()
    with pytest.raises(MediaError, match="the image takes more than 0.1 seconds"):
        decode_image(data[:-2] + scan * 40_000 + end)
    assert time.thread_time() - begin < 2
