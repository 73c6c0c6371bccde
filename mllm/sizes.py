"""How many tokens a media item becomes, from its size alone. Processor, sampler and model check all ask here."""

from dataclasses import dataclass

MediaSize = tuple[int, int] | tuple[float]
"""Height and width of an image in pixels, or the seconds of a sound."""
LONGEST_SOUND = float("inf")
"""Seconds that stand for the longest sound that a model reads."""


@dataclass(frozen=True)
class ImageTokenRule:
    """What an image encoder makes of one image of its native resolution.

    Args:
        image_size: Side of the square the encoder sees, in pixels.
        patch_size: Side of one patch, in pixels.
        num_prefix_tokens: Tokens the encoder puts in front of the patches (class token, registers).
        feature_select: "default" drops the first token, as stock LLaVA does; "full" keeps every token.
    """

    image_size: int
    patch_size: int
    num_prefix_tokens: int
    feature_select: str

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


def num_image_tokens(height: int, width: int, rule: ImageTokenRule) -> int:
    """Count the placeholders that stand for one image of `height` x `width` pixels.

    Every geometry so far (pad, crop, squash) makes a square of the encoder's native size first, so the count does not
    yet depend on the image. Callers pass the size all the same: tiles will need it.

    Example: CLIP ViT-L/14 at 336 px has 24 x 24 patches and a class token that "default" drops: 576.
    """
    dropped = 1 if rule.feature_select == "default" else 0
    return rule.grid**2 + rule.num_prefix_tokens - dropped
