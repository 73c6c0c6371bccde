"""How many tokens a sound becomes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm.errors import RowError
from mllm.sizes.lengths import EACH, LengthRule
from mllm.sizes.media import LONGEST_SECONDS, MediaSize


@dataclass(frozen=True)
class AudioTokenRule:
    """What an audio encoder and its connector make of one sound, which it reads in windows.

    Features follow one another in time, in steps of one or more; of a window that the end of a sound leaves partly
    empty, those steps count that lie in the sound, and at least one.

    Example: Whisper reads 30 s at 16 kHz in steps of 320 samples: 1,500 features; of a sound of 31 s 1,500 and 50.

    Args:
        sampling_rate: Samples a second that the encoder is made for.
        window: Samples of one view. A longer sound has several.
        samples_per_step: From one step to the next.
        first_step: With how many samples a window has its first step.
        features_per_step: How many features stand for one moment (patches of different pitch).
        counts_silence: Whether all features of a window count, of the silence behind a sound's end too.
        connector: How many vectors the connector makes of a view, or of all of them.
        is_joined: Whether the connector reads all windows of a sound as one sequence.
        most_windows: How many windows a sound may have; None for no limit.
        clips: Windows spread evenly over a sound, however long it is, of which what lies between them is not heard;
            0 for windows one behind the other that cover all of it.
    """

    sampling_rate: int
    window: int
    samples_per_step: int
    first_step: int = 1
    features_per_step: int = 1
    counts_silence: bool = False
    connector: LengthRule = EACH
    is_joined: bool = False
    most_windows: int | None = None
    clips: int = 0

    kind = "audio"
    num_dropped = 0

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "AudioTokenRule":
        """A rule from plain values, as JSON holds them."""
        return cls(**{**fields, "connector": LengthRule(**fields["connector"])})

    @property
    def most_views(self) -> int | None:
        """How many windows a sound has at most."""
        return self.clips or self.most_windows

    @property
    def features(self) -> int:
        """Features of a whole window."""
        return self._features_of(self.window)

    @property
    def window_seconds(self) -> float:
        """Seconds of one window."""
        return self.window / self.sampling_rate

    def num_samples(self, seconds: float) -> int:
        """How many samples so many seconds are, at the encoder's rate."""
        return round(seconds * self.sampling_rate)

    def samples(self, size: MediaSize) -> tuple[int, ...]:
        """The samples of each window of a sound of so many seconds; `LONGEST_SOUND` stands for the longest there is.

        Raises:
            RowError: It has no samples, or more windows than it may have.
        """
        seconds = float(size[0])
        if math.isinf(seconds):
            most = math.inf if self.most_windows is None else self.most_windows * self.window_seconds
            seconds = min(LONGEST_SECONDS, most)
        samples = self.num_samples(seconds)
        if samples < 1:
            raise RowError(
                f"a sound of {seconds:.3f} seconds",
                expected="a sound with samples",
                do="drop the row; or state its `seconds`, if that is only what its header says",
            )
        if seconds > LONGEST_SECONDS:
            raise RowError(
                f"a sound of {seconds:.0f} seconds",
                expected=f"at most {LONGEST_SECONDS:.0f} seconds",
                do="cut the sound with `start` and `end`",
            )
        if self.clips:
            return (min(samples, self.window),) * self.clips
        windows = -(-samples // self.window)
        if self.most_windows is not None and windows > self.most_windows:
            raise RowError(
                f"a sound of {seconds:.1f} seconds, which is {windows} windows of {self.window_seconds:g} seconds",
                expected=f"at most {self.most_windows} windows, as many as the connector has positions for",
                do="cut the sound with `start` and `end`, or assemble a model with more positions, or with `clips`",
            )
        return (self.window,) * (windows - 1) + (samples - (windows - 1) * self.window,)

    def starts(self, samples: int) -> tuple[int, ...]:
        """The first sample of each window of a sound of so many samples."""
        if self.clips:
            last = max(samples - self.window, 0)
            return tuple(last * place // max(self.clips - 1, 1) for place in range(self.clips))
        return tuple(range(0, samples, self.window))

    def views(self, size: MediaSize) -> tuple[int, ...]:
        """The features of each window of a sound of so many seconds that count.

        Raises:
            RowError: As `samples`.
        """
        samples = self.samples(size)
        return (self.features,) * len(samples) if self.counts_silence else tuple(map(self._features_of, samples))

    def arranged(self, size: MediaSize, lengths: tuple[int, ...]) -> int:
        """How many tokens connected windows of these lengths become."""
        return sum(lengths)

    def _features_of(self, samples: int) -> int:
        """Features that lie in so many samples of a window; those of one step at least."""
        return max(1, (samples - self.first_step) // self.samples_per_step + 1) * self.features_per_step
