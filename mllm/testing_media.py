"""Rows about pictures, sounds and videos in any order, with real files, for tests and scripts."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from mllm.testing_sounds import RATE, sine, write_wav

KINDS = {"i": "image", "a": "audio", "v": "video"}
SUFFIXES = {"image": "png", "audio": "wav", "video": "mp4"}


def save_tiny_media_rows(directory: Path, contents: Sequence[str]) -> Path:
    """Write rows whose questions hold texts and media in a stated order, and return their JSONL file.

    No two files are alike. Answers are of unequal length.

    Args:
        directory: Where `rows.jsonl` and `media` are made.
        contents: Of each row one letter for each content item: "i" an image, "a" a sound of 0.3 to 1.9 seconds, "v" a
            video of 5 to 11 frames, "t" a text; a text ends each question all the same.
    """
    (directory / "media").mkdir(parents=True)
    rows = []
    for number, letters in enumerate(contents):
        content: list[dict] = []
        media = []
        for place, letter in enumerate(letters):
            if letter == "t":
                content.append({"type": "text", "text": f"Then comes {place}. "})
                continue
            kind = KINDS[letter]
            name = f"media/{number}-{place}.{SUFFIXES[kind]}"
            content.append({"type": kind})
            media.append({"kind": kind, "path": name} | _write(kind, directory / name, seed=10 * number + place))
        content.append({"type": "text", "text": f"What is number {number}?"})
        answer = "a red 3" + " and a 7" * (number % 5)
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"row-{number}", "source": "tiny", "messages": messages, "media": media})
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tiny_video(path: Path, *, frames: int, fps: int = 5, seed: int = 0, times: Sequence[float] = ()) -> Path:
    """A video of flat colours, each frame another.

    Args:
        path: Of the file, whose suffix says its form.
        frames: How many; more than there are `times` are not written.
        fps: Frames a second.
        seed: Of the colours.
        times: When each frame is shown, in place of a constant rate.
    """
    colours = np.random.default_rng(seed).integers(20, 235, (frames, 3))
    import av  # here: `import mllm.testing_media` needs no optional package

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times or [number / fps for number in range(frames)]):
            pixels = np.broadcast_to(colours[number].astype(np.uint8), (24, 32, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _write(kind: str, path: Path, *, seed: int) -> dict:
    """Write a file, and say how large it is."""
    random = np.random.default_rng(seed)
    if kind == "image":
        height, width = (int(side) for side in random.integers(10, 30, 2))
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        return {"height": height, "width": width}
    if kind == "audio":
        samples = sine(0.3 + 0.2 * (seed % 9), pitch=200.0 + 10 * seed)
        write_wav(path, samples)
        return {"seconds": len(samples) / RATE}
    frames = 5 + seed % 7
    write_tiny_video(path, frames=frames, seed=seed)
    return {"height": 24, "width": 32, "frames": frames, "seconds": frames / 5}
