"""Which frames of a video a model sees: the published rules, as functions of the number of frames and their rate."""

import math
from dataclasses import dataclass

import numpy as np

from mllm.errors import OptionError, RowError

RULES = ("uniform", "segment", "fps", "cap", "upbound")
FORMS = "uniform:N, segment:N, segment:N:SEED, fps:R, fps:R:MIN:MAX, cap:R:N or upbound:N"


@dataclass(frozen=True, slots=True)
class Sampling:
    """A rule and its numbers. Every rule applies to the frames between `start` and `end` of a media item.

    - "uniform": `frames` from the first to the last, evenly: `linspace(0, n - 1, frames).round()`.
    - "segment": `frames` equal segments, and the middle of each; with a seed a random frame of each.
    - "fps": `fps` a second, at least `frames`, at most `max_frames`, a multiple of two, evenly (Qwen2-VL and later).
    - "cap": one every 1 / `fps` seconds; where these are more than `max_frames`, that many evenly (VideoLLaMA3).
    - "upbound": one a second; where these are more than `max_frames`, that many evenly (LLaVA-NeXT).

    Args:
        rule: One of `RULES`.
        frames: How many ("uniform", "segment"), or how many at least ("fps").
        fps: Frames a second ("fps", "cap").
        max_frames: How many at most ("fps", "cap", "upbound").
        seed: Of random places ("segment").
    """

    rule: str
    frames: int = 0
    fps: float = 0.0
    max_frames: int = 0
    seed: int | None = None

    def __post_init__(self):
        wanted = {
            "uniform": self.frames > 0,
            "segment": self.frames > 0,
            "fps": self.fps > 0 and 0 < self.frames <= self.max_frames and self.max_frames > 1,
            "cap": self.fps > 0 and self.max_frames > 0,
            "upbound": self.max_frames > 0,
        }
        if not wanted.get(self.rule, False) or not math.isfinite(self.fps):
            raise OptionError(f"video sampling {self}", expected=FORMS, do="name a rule and positive numbers")


def parse_sampling(text: str) -> Sampling:
    """The rule that a text such as "uniform:8" or "fps:2" names; "fps:R" alone has Qwen's limits, 4 and 768.

    Raises:
        OptionError: It names none.
    """
    rule, *numbers = text.split(":")
    try:
        match rule, [float(number) for number in numbers]:
            case "uniform" | "segment", [frames]:
                return Sampling(rule, frames=_whole(frames))
            case "segment", [frames, seed]:
                return Sampling(rule, frames=_whole(frames), seed=_whole(seed))
            case "fps", [fps]:
                return Sampling(rule, frames=4, fps=fps, max_frames=768)
            case "fps", [fps, least, most]:
                return Sampling(rule, frames=_whole(least), fps=fps, max_frames=_whole(most))
            case "cap", [fps, most]:
                return Sampling(rule, fps=fps, max_frames=_whole(most))
            case "upbound", [most]:
                return Sampling(rule, max_frames=_whole(most))
    except ValueError as error:
        raise OptionError(f"video sampling {text!r}", expected=FORMS, do="name a rule and positive numbers") from error
    raise OptionError(f"video sampling {text!r}", expected=FORMS, do="name a rule and its numbers")


def sample_frames(times: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Which frames a rule picks.

    The published rules count frames. Where frames do not follow each other at a constant rate, an evenly spaced place
    stands for the frame nearest in time.

    Args:
        times: When each frame is shown, in seconds, ascending; at least one.
        sampling: The rule.

    Returns:
        Indices into `times`, ascending; the same one several times where there are fewer frames than asked for.
    """
    num_frames = len(times)
    span = float(times[-1] - times[0])
    rate = (num_frames - 1) / span if span > 0 else 1.0
    places = frame_places(num_frames, rate, sampling)
    return nearest_frames(times, times[0] + places * (span / max(num_frames - 1, 1)))


def nearest_frames(times: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Which frame is nearest to each moment; of two that are equally near, the earlier.

    Args:
        times: When each frame is shown, in seconds, ascending; at least one.
        moments: In seconds.
    """
    after = np.searchsorted(times, moments).clip(0, len(times) - 1)
    before = (after - 1).clip(0)
    return np.where(moments - times[before] <= times[after] - moments, before, after)


def frame_places(num_frames: int, rate: float, sampling: Sampling) -> np.ndarray:
    """The indices that a rule picks of frames at a constant rate.

    Args:
        num_frames: How many there are.
        rate: Frames a second.
        sampling: The rule.
    """
    match sampling.rule:
        case "uniform":
            return _evenly(num_frames, sampling.frames)
        case "segment":
            return _segments(num_frames, sampling.frames, sampling.seed)
        case "fps":
            # qwen_vl_utils.vision_process.smart_nframes; one frame alone is shown twice.
            most = min(_floor_even(sampling.max_frames), num_frames)
            count = min(max(num_frames / rate * sampling.fps, _ceil_even(sampling.frames)), most)
            return _evenly(num_frames, max(_floor_even(count), 2))
        case "cap":
            count = max(math.ceil(round(num_frames / rate * sampling.fps, 6)), 1)
            if count > sampling.max_frames:
                return _evenly(num_frames, sampling.max_frames)
            return (np.arange(count) * (rate / sampling.fps)).round().astype(int).clip(0, num_frames - 1)
        case _:
            places = np.arange(0, num_frames, max(round(rate), 1))
            if len(places) <= sampling.max_frames:
                return places
            return np.linspace(0, num_frames - 1, sampling.max_frames, dtype=int)  # rounds down, as LLaVA-NeXT does


def frame_times(frames: int, seconds: float, sampling: Sampling) -> tuple[float, ...]:
    """When the frames that a rule picks are shown, by a file's header alone: at a constant rate.

    Where the real rate is not constant, a decoder takes the frame that is shown at each of these moments.

    Args:
        frames: How many frames the video has.
        seconds: How long it is.
        sampling: The rule.

    Raises:
        RowError: The header does not say both.
    """
    if frames < 1 or seconds <= 0:
        raise RowError(
            f"a video of {frames} frames and {seconds:g} seconds, by its header",
            expected="at least one frame, and a length",
            do="write the file anew with a header that says both, or drop the row",
        )
    rate = frames / seconds
    return tuple(float(place) / rate for place in frame_places(frames, rate, sampling))


def most_places(seconds: float, sampling: Sampling) -> int:
    """At least as many places as a rule picks of any video that is no longer than this, whatever its rate.

    Args:
        seconds: How long it is at most.
        sampling: The rule.
    """
    match sampling.rule:
        case "uniform" | "segment":
            return sampling.frames
        case "fps":
            wanted = max(math.ceil(seconds * sampling.fps), _ceil_even(sampling.frames))
            return max(min(wanted, sampling.max_frames), 2)
        case "cap":
            return min(math.ceil(seconds * sampling.fps) + 1, sampling.max_frames)
        case _:
            # A rate is rounded, from 1.5 frames a second down to 1 at worst.
            return min(math.ceil(seconds * 1.5) + 1, sampling.max_frames)


def _evenly(num_frames: int, count: int) -> np.ndarray:
    return np.linspace(0, num_frames - 1, count).round().astype(int)


def _segments(num_frames: int, count: int, seed: int | None) -> np.ndarray:
    """As InternVideo and VideoChat2: with fewer frames than segments, all of them, and the last one again."""
    bounds = np.linspace(0, num_frames, min(count, num_frames) + 1).astype(int)
    first, last = bounds[:-1], bounds[1:] - 1
    if seed is None:
        places = (first + last) // 2
    else:
        places = np.random.default_rng(seed).integers(first, last, endpoint=True)
    return np.pad(places, (0, count - len(places)), mode="edge")


def _floor_even(number: int | float) -> int:
    return math.floor(number / 2) * 2


def _ceil_even(number: int | float) -> int:
    return math.ceil(number / 2) * 2


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError(f"{number} is no whole number")
    return int(number)
