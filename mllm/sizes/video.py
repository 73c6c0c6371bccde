"""How many tokens a video becomes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm.errors import RowError
from mllm.sizes.lengths import EACH, LengthRule
from mllm.sizes.media import MediaSize
from mllm.sizes.sampling import Sampling, frame_times, most_places, parse_sampling


@dataclass(frozen=True)
class VideoTokenRule:
    """What a video tower makes of one video: an image encoder sees frame after frame.

    Args:
        sampling: Which frames, as `parse_sampling` reads it: "uniform:8", "fps:2", ...
        features: Features of a frame.
        connector: How many vectors the connector makes of a frame, or of all of them.
        is_joined: Whether the connector reads all frames of a video as one sequence.
        most_frames: How many frames a video may have; None for no limit.
        has_timestamps: Whether the prompt says when each frame is shown.
    """

    sampling: str
    features: int
    connector: LengthRule = EACH
    is_joined: bool = False
    most_frames: int | None = None
    has_timestamps: bool = False

    kind = "video"
    num_dropped = 0

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "VideoTokenRule":
        """A rule from plain values, as JSON holds them."""
        return cls(**{**fields, "connector": LengthRule(**fields["connector"])})

    def __post_init__(self):
        parse_sampling(self.sampling)  # a wrong one is named now, not at the first row

    @property
    def most_views(self) -> int | None:
        """How many frames a video has at most."""
        return self.most_frames

    @property
    def choice(self) -> Sampling:
        """Which frames, parsed."""
        return parse_sampling(self.sampling)

    def times(self, size: MediaSize) -> tuple[float, ...]:
        """When the frames that are seen are shown, in seconds from where the item begins.

        Raises:
            RowError: The video has no frames, or more than it may have.
        """
        frames, seconds = (float(number) for number in size[-2:])
        times = frame_times(int(frames), seconds, self.choice)
        self._check(len(times), f"a video of {seconds:.1f} seconds, of which {self.sampling!r} takes")
        return times

    def views(self, size: MediaSize) -> tuple[int, ...]:
        """The features of each frame that is seen of a video of this size."""
        return (self.features,) * len(self.times(size))

    def views_of_frames(self, frames: int) -> tuple[int, ...]:
        """The features of each frame of a video of which so many are seen.

        Raises:
            RowError: These are none, or more than there may be.
        """
        self._check(frames, "a video with")
        return (self.features,) * frames

    def arranged(self, size: tuple, lengths: tuple[int, ...]) -> int:
        """How many tokens connected frames of these lengths become."""
        return sum(lengths)

    def most_frames_within(self, seconds: float) -> int:
        """At least as many frames as are seen of any video that is no longer than this."""
        most = most_places(seconds, self.choice)
        return most if self.most_frames is None else min(most, self.most_frames)

    def _check(self, frames: int, found: str) -> None:
        if frames < 1:
            raise RowError(f"{found} {frames} frames", expected="at least one frame", do="drop the row")
        if self.most_frames is not None and frames > self.most_frames:
            raise RowError(
                f"{found} {frames} frames",
                expected=f"at most {self.most_frames} frames, as many as the connector has positions for",
                do="sample fewer (`frames: uniform:N`), or assemble a model with more `positions`",
            )
