"""Video files to upright RGB frames and the times at which they are shown."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.errors import MediaError
from mllm.processing.containers import check_source, first_bytes, open_container
from mllm.processing.decode_limit import with_time_limit
from mllm.processing.files import media_name, signature
from mllm.processing.images import MAX_PIXELS
from mllm.processing.torchcodec_frames import torchcodec_frames
from mllm.sizes.sampling import Sampling, nearest_frames, sample_frames

MAX_FRAMES = 1_000_000
MAX_SECONDS = 86_400.0
MAX_CLIP_PIXELS = 500_000_000
"""Of all frames that one call returns."""
LENGTH_SLACK = 0.1
"""Seconds, or share of its length, by which a video may be shorter than whoever asks for its frames takes it for."""
HEADER_SECONDS = 10.0
DECODE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """What a video file's header says.

    Args:
        height: Of a frame as it is shown, in pixels: rotation applied.
        width: In pixels.
        frames: How many; counted where the header does not say (WebM, MKV, GIF).
        seconds: Length; of the frames that were counted where the header does not say both.
        format: Such as "MP4".
        notes: What an audit would name.
    """

    height: int
    width: int
    frames: int
    seconds: float
    format: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """Frames of a video.

    Args:
        frames: RGB, upright, all of one size.
        timestamps: When each is shown, in seconds from the beginning of the file.
    """

    frames: list[Image.Image]
    timestamps: list[float]


def video_header(source: Path | bytes, *, where: str = "", seconds: float = HEADER_SECONDS) -> VideoHeader:
    """Read a video's header, and one frame, which alone knows how it is turned.

    Where the header does not say how many frames there are, or how long they last, the file is read to its end and
    they are counted; nothing more is decoded.

    Args:
        source: The file, or its content.
        where: Names the row in errors.
        seconds: How long it may take.

    Raises:
        MediaError: There is no video in it, it is damaged, over a limit, or takes too long.
    """
    name = media_name("video", source, where)
    check_source(source, name)
    fields = with_time_limit(_read_header, source, name, seconds=seconds, name=name)
    return VideoHeader(**{**fields, "notes": tuple(fields["notes"])})


def decode_video(
    source: Path | bytes,
    *,
    sampling: Sampling | Sequence[float],
    start: float | None = None,
    end: float | None = None,
    where: str = "",
    seconds: float = DECODE_SECONDS,
) -> VideoFrames:
    """Decode the frames that a rule picks.

    Args:
        source: The file, or its content.
        sampling: The rule, which applies to the frames between `start` and `end`; or the moments, in seconds from the
            beginning of the file, whose nearest frames are wanted.
        start: First second; None for the beginning.
        end: Last second; None for the end.
        where: Names the row in errors.
        seconds: How long it may take.

    Raises:
        MediaError: As `video_header`; or it ends before `start` or a moment, or its frames are too many and too large.
    """
    name = media_name("video", source, where)
    check_source(source, name)
    told = asdict(sampling) if isinstance(sampling, Sampling) else list(sampling)
    pixels, places, times = with_time_limit(_read_frames, source, told, start, end, name, seconds=seconds, name=name)
    frames = [Image.fromarray(frame) for frame in pixels]
    return VideoFrames([frames[place] for place in places], [times[place] for place in places])


# What follows runs in the decoders' process.


def _read_header(source: Path | bytes, name: str) -> dict[str, Any]:
    with open_container(source, name, "video") as container:
        stream = container.streams.video[0]
        _check_size(stream.width, stream.height, name)
        seconds = _seconds(container, stream)
        frames = max(stream.frames, 0)
        if frames > MAX_FRAMES:
            raise _too_long(name, f"{frames:,} frames")
        if seconds > MAX_SECONDS:
            raise _too_long(name, f"{seconds:,.0f} seconds")
        stream.thread_count = 1
        first = next(container.decode(stream))
        is_turned = first.rotation % 180 != 0
        notes = ["rotation"] if first.rotation % 360 else []
        if (stream.sample_aspect_ratio or 1) != 1:
            notes.append("non-square pixels")
        form = signature(first_bytes(source, name)) or container.format.name.split(",")[0].upper()
        height, width = (first.width, first.height) if is_turned else (first.height, first.width)
    if not frames or not seconds:
        frames, seconds = _counted(source, name)
    return {
        "height": height, "width": width, "frames": frames, "seconds": seconds, "format": form, "notes": notes,
    }  # fmt: skip


def _counted(source: Path | bytes, name: str) -> tuple[int, float]:
    """How many frames there are, and how long they last, the last as long as is usual. Nothing is decoded."""
    with open_container(source, name, "video") as container:
        stream = container.streams.video[0]
        ticks, _ = _packet_ticks(container, stream, name)
        rate = stream.average_rate or stream.guessed_rate or 1
        usual = float(np.median(np.diff(ticks)) * stream.time_base) if len(ticks) > 1 else 1 / float(rate)
        seconds = float((ticks[-1] - ticks[0]) * stream.time_base) + usual
        if seconds > MAX_SECONDS:
            raise _too_long(name, f"{seconds:,.0f} seconds")
        return len(ticks), seconds


def _seconds(container: Any, stream: Any) -> float:
    if stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / 1e6
    return max(seconds, 0.0)


def _read_frames(
    source: Path | bytes, sampling: dict[str, Any] | list[float], start: float | None, end: float | None, name: str
) -> tuple[np.ndarray, list[int], list[float]]:
    """Pixels of the frames that are needed, which of them stands at each place, and when they are shown."""
    with open_container(source, name, "video") as container:
        stream = container.streams.video[0]
        _check_size(stream.width, stream.height, name)
        stream.thread_count = 1
        ticks, keys = _packet_ticks(container, stream, name)
        origin = (container.start_time or 0) / 1e6
        times = ticks * float(stream.time_base) - origin
        first, last = _interval(times, start, end, name)
        if isinstance(sampling, list):
            _check_length(times, max(sampling), _seconds(container, stream), name)
            picked = first + nearest_frames(times[first:last], np.array(sampling))
        else:
            picked = first + sample_frames(times[first:last], Sampling(**sampling))
        wanted, places = np.unique(picked, return_inverse=True)
        if len(wanted) * stream.width * stream.height > MAX_CLIP_PIXELS:
            raise MediaError(
                f"{name}: {len(wanted)} frames of {stream.width} x {stream.height} pixels",
                expected=f"at most {MAX_CLIP_PIXELS:,} pixels in all frames together",
                do="pick fewer frames, or make the video smaller",
            )
        whole = torchcodec_frames(source, wanted, ticks * float(stream.time_base))
        if whole is not None:
            return whole, places.tolist(), times[wanted].tolist()
        pixels, shown = [], []
        for frame in _decode_at(container, stream, ticks[wanted], keys, name):
            pixels.append(_upright(frame, stream.width, stream.height))
            shown.append(frame.pts * float(stream.time_base) - origin)
        return np.stack(pixels), places.tolist(), shown


def _packet_ticks(container: Any, stream: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """When each frame is shown, and which of them are key frames, in the stream's time base. Nothing is decoded."""
    ticks, keys = [], []
    for packet in container.demux(stream):
        tick = packet.dts if packet.pts is None else packet.pts
        if tick is None or not packet.size or packet.is_discard:
            continue
        ticks.append(tick)
        if packet.is_keyframe:
            keys.append(tick)
        if len(ticks) > MAX_FRAMES:
            raise _too_long(name, f"{len(ticks):,} frames or more")
    is_indexed = "mp4" in container.format.name  # its header counts the very frames
    if not ticks or (is_indexed and len(ticks) < len(stream.index_entries)):
        raise MediaError(
            f"{name} is cut off: {len(ticks)} of {stream.frames} frames are there",
            expected="complete data",
            do="fetch the file again, or drop the row",
        )
    return np.unique(ticks), np.unique(keys)


def _interval(times: np.ndarray, start: float | None, end: float | None, name: str) -> tuple[int, int]:
    """First frame, and the one behind the last, that are shown between two moments."""
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    if start is not None and start > times[-1] + usual:
        raise MediaError(
            f"{name} ends after {times[-1] + usual:.2f} seconds, before start = {start:g}",
            expected="a start inside the video",
            do="correct the row's `start`, or drop it",
        )
    if start is not None and end is not None and end < start:
        raise MediaError(
            f"{name}: start = {start:g}, end = {end:g}", expected="an end behind the start", do="correct the row"
        )
    slack = 1e-3 * usual
    first = 0 if start is None else int(np.searchsorted(times, start - slack))
    last = len(times) if end is None else int(np.searchsorted(times, end + slack, side="right"))
    if first >= last:  # both lie while one frame is on the screen
        first = max(last - 1, 0)
        last = first + 1
    return first, last


def _check_length(times: np.ndarray, last: float, stated: float, name: str) -> None:
    """Refuse a moment behind the end: whoever wants it takes the video for a longer one."""
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    length = max(float(times[-1]) + usual, stated)
    if last > length + max(LENGTH_SLACK, LENGTH_SLACK * length):
        raise MediaError(
            f"{name} ends after {length:.2f} seconds, and a frame at {last:.2f} seconds is asked for",
            expected="a row that states the length which the file has",
            do="correct the row's `seconds` and `frames`, or leave them out",
        )


def _decode_at(container: Any, stream: Any, wanted: np.ndarray, keys: np.ndarray, name: str) -> Iterator[Any]:
    """Frames at given times, ascending; only what lies between a key frame and a wanted frame is decoded."""
    cursor = None
    for tick in wanted.tolist():
        place = int(np.searchsorted(keys, tick, side="right")) - 1
        key = int(keys[place]) if place >= 0 else int(wanted[0])
        if cursor is None or cursor.is_before(key):
            cursor = _Cursor(container, stream, key)
            if cursor.is_behind(tick) and place > 0:
                cursor = _Cursor(container, stream, int(keys[0]))  # an index that leads astray
        frame = cursor.nearest(tick)
        if frame is None:
            raise MediaError(
                f"{name} has no frame that can be decoded", expected="a whole video", do="fetch it again, or drop it"
            )
        yield frame


class _Cursor:
    """A place in a stream that moves forward frame by frame."""

    def __init__(self, container: Any, stream: Any, tick: int):
        container.seek(tick, stream=stream, backward=True)
        self._frames = (frame for frame in container.decode(stream) if frame.pts is not None)
        self._before: Any = None
        self._now: Any = next(self._frames, None)

    def is_before(self, tick: int) -> bool:
        return self._now is not None and self._now.pts < tick

    def is_behind(self, tick: int) -> bool:
        return self._now is None or self._now.pts > tick

    def nearest(self, tick: int) -> Any:
        while self.is_before(tick):
            self._before, self._now = self._now, next(self._frames, None)
        if self._now is None or (self._before is not None and tick - self._before.pts < self._now.pts - tick):
            return self._before
        return self._now


def _upright(frame: Any, width: int, height: int) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.rot90(pixels, round(frame.rotation / 90))


def _check_size(width: int, height: int, name: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise MediaError(
            f"{name} has {width} x {height} pixels",
            expected=f"1 to {MAX_PIXELS:,} pixels a frame",
            do="make it smaller, or drop the row",
        )


def _too_long(name: str, found: str) -> MediaError:
    return MediaError(
        f"{name} has {found}",
        expected=f"at most {MAX_FRAMES:,} frames and {MAX_SECONDS:,.0f} seconds",
        do="cut it into several files, or drop the row",
    )
