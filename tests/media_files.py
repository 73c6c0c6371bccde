"""Small video and audio files, made for real. Frames carry their number in their pixels."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 10
WIDTH, HEIGHT = 16 * BITS, 48


def frame_pixels(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Black and white columns: the number in binary, lowest bit on the left; the lower half inverted."""
    bits = [number >> bit & 1 for bit in range(BITS)]
    columns = np.repeat(np.array(bits, np.uint8) * 255, width // BITS)
    upper = np.broadcast_to(columns, (height // 2, width))
    return np.repeat(np.concatenate([upper, 255 - upper])[..., None], 3, axis=2)


def frame_number(image: Image.Image) -> int:
    """The number that an upright frame carries."""
    pixels = np.asarray(image.convert("L")).astype(int)
    step = pixels.shape[1] // BITS
    columns = pixels[: pixels.shape[0] // 3, step // 2 :: step].mean(axis=0)
    return sum((value > 128) << bit for bit, value in enumerate(columns))


def write_video(
    path: Path,
    *,
    times: Sequence[float],
    codec: str = "libx264",
    key_every: int = 12,
    sound: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """A video with a frame at each of some times."""
    clock = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "rgb8" if codec == "gif" else "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 100) if codec == "gif" else clock
        stream.codec_context.gop_size = key_every
        voice = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(frame_pixels(number), format="rgb24")
            frame.pts, frame.time_base = round(time / stream.codec_context.time_base), stream.codec_context.time_base
            container.mux(stream.encode(frame))
        if voice is not None:
            for first in range(0, round(times[-1] * 16000), 1024):
                wave = np.sin(2 * np.pi * 440 * np.arange(first, first + 1024) / 16000).astype(np.float32)
                sound_frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
                sound_frame.sample_rate, sound_frame.pts = 16000, first
                container.mux(voice.encode(sound_frame))
            container.mux(voice.encode())
        container.mux(stream.encode())
    return path


def turn(path: Path, degrees: int, target: Path) -> Path:
    """The same MP4 with a display matrix, as a telephone held upright writes it: to be turned clockwise."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    place = header + (52 if data[header] else 40)
    one = 1 << 16
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


def write_endless(path: Path, *, num_frames: int, side: int = 2048) -> Path:
    """A small WebM whose frames are large and nearly free of content: hours of decoding in a few megabytes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx", rate=25, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        packets = []
        for _ in range(2):
            grey = np.full((side * 3 // 2, side), 128, np.uint8)
            packets += stream.encode(av.VideoFrame.from_ndarray(grey, format="yuv420p"))
        packets += stream.encode()
        for number in range(num_frames):
            packet = av.Packet(bytes(packets[min(number, 1)]))
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = number
            packet.is_keyframe = number == 0
            container.mux(packet)
    return path
