"""Audio files, and the sound of video files, to samples of one channel at the rate a model wants."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mllm.errors import MediaError
from mllm.processing.containers import check_source, first_bytes, open_container
from mllm.processing.decode_limit import with_time_limit
from mllm.processing.files import media_name, signature
from mllm.sizes.media import LONGEST_SECONDS

MAX_SECONDS = LONGEST_SECONDS
"""Of what one call returns."""
HEADER_SECONDS = 10.0
DECODE_SECONDS = 60.0
_BLOCK = 1 << 18
_SOUNDFILE = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU")  # what it is asked to read; the rest is for PyAV


@dataclass(frozen=True, slots=True)
class AudioHeader:
    """What an audio file's header says.

    Args:
        seconds: Length; 0.0 if the header does not say.
        sampling_rate: Samples a second.
        channels: How many.
        format: Such as "WAV".
        notes: What an audit would name.
    """

    seconds: float
    sampling_rate: int
    channels: int
    format: str
    notes: tuple[str, ...]


def audio_header(source: Path | bytes, *, where: str = "", seconds: float = HEADER_SECONDS) -> AudioHeader:
    """Read the header of an audio file, or of the sound of a video file.

    Args:
        source: The file, or its content.
        where: Names the row in errors.
        seconds: How long it may take.

    Raises:
        MediaError: There is no sound in it, it is damaged, or takes too long.
    """
    name = media_name("audio", source, where)
    check_source(source, name)
    length, rate, channels, form, notes = with_time_limit(_read_header, source, name, seconds=seconds, name=name)
    return AudioHeader(length, rate, channels, form, tuple(notes))


def decode_audio(
    source: Path | bytes,
    *,
    start: float | None = None,
    end: float | None = None,
    sampling_rate: int,
    where: str = "",
    seconds: float = DECODE_SECONDS,
) -> tuple[np.ndarray, int]:
    """Decode sound: channels averaged, resampled with a low-pass filter.

    Args:
        source: The file, or its content.
        start: First second; None for the beginning.
        end: Last second; None for the end. An end behind the end of the file means that.
        sampling_rate: Samples a second of the result.
        where: Names the row in errors.
        seconds: How long it may take.

    Returns:
        float32 samples `[samples]` in -1..1, and `sampling_rate`.

    Raises:
        MediaError: As `audio_header`; or it ends before `start`, or is longer than `MAX_SECONDS`: nothing is cut
            without being asked.
    """
    name = media_name("audio", source, where)
    check_source(source, name)
    if start is not None and end is not None and end <= start:
        raise MediaError(
            f"{name}: start = {start:g}, end = {end:g}", expected="an end behind the start", do="correct the row"
        )
    samples = with_time_limit(
        _read_samples, source, start or 0.0, end, sampling_rate, name, seconds=seconds, name=name
    )
    return samples, sampling_rate


# What follows runs in the decoders' process.


def _read_header(source: Path | bytes, name: str) -> list[Any]:
    form = _format(source, name)
    if form in _SOUNDFILE and (info := _soundfile_info(source)) is not None:
        return [info.frames / info.samplerate, info.samplerate, info.channels, form, []]
    with open_container(source, name, "audio") as container:
        stream = container.streams.audio[0]
        notes = ["sound of a video"] if container.streams.video else []
        form = form or container.format.name.split(",")[0].upper()
        return [_seconds(container, stream), stream.rate, stream.codec_context.channels, form, notes]


def _read_samples(source: Path | bytes, start: float, end: float | None, sampling_rate: int, name: str) -> np.ndarray:
    form = _format(source, name)
    if form in _SOUNDFILE and _soundfile_info(source) is not None:
        samples, rate = _read_soundfile(source, start, end, name)
    else:
        samples, rate = _read_pyav(source, start, end, name)
    if not len(samples):
        raise MediaError(
            f"{name} ends before start = {start:g}" if start else f"{name} holds no samples",
            expected="sound behind the start" if start else "a sound with samples",
            do="correct its `start`, or leave it out" if start else "leave it out",
        )
    return _resample(samples, rate, sampling_rate)


def _format(source: Path | bytes, name: str) -> str:
    """The format; a WAV file that is shorter than it says is refused, because soundfile would take what is there."""
    head = first_bytes(source, name)
    form = signature(head)
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    stated = int.from_bytes(head[4:8], "little") + 8
    # Programs that write into a pipe cannot know the size, and state 0 or the largest.
    if form == "WAV" and head.startswith(b"RIFF") and size < stated < 0x7FFF_0000 and stated > 8:
        raise _damaged(name, f"{size:,} of {stated:,} bytes are there")
    return form


def _soundfile_info(source: Path | bytes) -> Any:
    """The header as soundfile reads it; None for what only PyAV may be able to read."""
    import soundfile

    try:
        return soundfile.info(BytesIO(source) if isinstance(source, bytes) else str(source))
    except soundfile.SoundFileError:
        return None


def _read_soundfile(source: Path | bytes, start: float, end: float | None, name: str) -> tuple[np.ndarray, int]:
    import soundfile

    with soundfile.SoundFile(BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
        rate = file.samplerate
        first = min(round(start * rate), file.frames)
        last = file.frames if end is None else min(round(end * rate), file.frames)
        _check_length((last - first) / rate, name)
        parts = []
        try:
            file.seek(first)
            for block in file.blocks(_BLOCK, frames=last - first, dtype="float32", always_2d=True):
                parts.append(block.mean(axis=1))
        except soundfile.SoundFileError as error:
            raise _damaged(name, str(error)) from error
        samples = np.concatenate([np.empty(0, np.float32), *parts])
        if len(samples) < last - first:
            raise _damaged(name, f"{len(samples)} of {last - first} samples are there")
        return samples, rate


def _read_pyav(source: Path | bytes, start: float, end: float | None, name: str) -> tuple[np.ndarray, int]:
    import av

    with open_container(source, name, "audio") as container:
        stream = container.streams.audio[0]
        rate = stream.rate
        mono = av.AudioResampler(format="fltp", layout=stream.layout, rate=rate)
        origin = (container.start_time or 0) / 1e6
        if start > 1:
            container.seek(int((start - 1 + origin) / stream.time_base), stream=stream, backward=True)
        parts, begin, length = [], None, 0
        for frame in container.decode(stream):
            for part in mono.resample(frame):
                moment = (part.time or 0.0) - origin
                begin = moment if begin is None else begin
                parts.append(part.to_ndarray().mean(axis=0))
                length += part.samples
                if moment + part.samples / rate > start:
                    _check_length(begin + length / rate - start, name)
            if end is not None and begin is not None and begin + length / rate >= end:
                break
        if begin is None:
            raise _damaged(name, "nothing can be decoded")
        samples = np.concatenate(parts).astype(np.float32)
        stated = _seconds(container, stream) if "mp4" in container.format.name else 0.0
        if end is None and begin + length / rate < stated - max(0.5, 0.02 * stated):
            raise _damaged(name, f"{begin + length / rate:.1f} of {stated:.1f} seconds are there")
        last = len(samples) if end is None else round((end - begin) * rate)
        return samples[max(round((start - begin) * rate), 0) : max(last, 0)], rate


def _resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    import soxr

    resampled = samples if rate == wanted else soxr.resample(samples, rate, wanted)
    return np.ascontiguousarray(resampled, dtype=np.float32)


def _seconds(container: Any, stream: Any) -> float:
    if stream.duration and stream.time_base:
        return max(float(stream.duration * stream.time_base), 0.0)
    return max((container.duration or 0) / 1e6, 0.0)


def _check_length(seconds: float, name: str) -> None:
    if seconds > MAX_SECONDS:
        raise MediaError(
            f"{name} has {seconds:.0f} seconds of sound or more",
            expected=f"at most {MAX_SECONDS:.0f} seconds",
            do="give the row `start` and `end`, or cut the file",
        )


def _damaged(name: str, problem: str) -> MediaError:
    return MediaError(
        f"{name} is damaged or cut off: {problem}", expected="complete data", do="fetch it again, or drop the row"
    )
