"""How many media of which length a conversation may hold, for pages and servers that anybody can send files to."""

from collections.abc import Sequence
from dataclasses import dataclass

from mllm.errors import MediaError, OptionError
from mllm.inference.media import KINDS, NOUNS, Medium, counted


@dataclass(frozen=True)
class MediaLimits:
    """Bounds of one conversation; None for no bound.

    Args:
        images: How many images.
        sounds: How many sounds.
        videos: How many videos.
        seconds: How long a sound or a video may be, each by itself.
    """

    images: int | None = None
    sounds: int | None = None
    videos: int | None = None
    seconds: int | float | None = None

    def __post_init__(self):
        if any(bound is not None and bound < 0 for bound in (self.images, self.sounds, self.videos, self.seconds)):
            raise OptionError(f"{self}", expected="numbers of 0 or more, or null", do="correct them")

    def check_numbers(self, kinds: Sequence[str]) -> None:
        """Refuse too many media, before any is opened.

        Raises:
            MediaError: There are.
        """
        for kind, most in zip(KINDS, (self.images, self.sounds, self.videos), strict=True):
            if most is not None and kinds.count(kind) > most:
                raise MediaError(
                    f"{counted([one for one in kinds if one == kind])} in this conversation",
                    expected=f"at most {most}",
                    do=f"start a new conversation with fewer {NOUNS[kind]}s",
                )

    def check_length(self, medium: Medium) -> None:
        """Refuse a sound or a video that is too long, by its header, before it is decoded.

        Raises:
            MediaError: It is.
        """
        if self.seconds is None or medium.item.kind == "image":
            return
        found = float(medium.size[-1])
        if found > self.seconds:
            raise MediaError(
                f"{medium.name} is {found:.1f} seconds long",
                expected=f"at most {self.seconds:g} seconds",
                do="send a shorter part of it",
            )


NO_LIMITS = MediaLimits()
