"""How many tokens an image becomes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mllm.sizes.lengths import EACH, LengthRule
from mllm.sizes.media import MediaSize
from mllm.sizes.tiles import Grid, TileRule


@dataclass(frozen=True)
class ImageTokenRule:
    """What an image encoder and its connector make of one image.

    Example: CLIP ViT-L/14 at 336 px has 24 x 24 patches and a class token that "default" drops: 576 tokens.

    Args:
        image_size: Side of the square the encoder sees, in pixels.
        patch_size: Side of one patch, in pixels.
        num_prefix_tokens: Tokens the encoder puts in front of the patches (class token, registers).
        feature_select: "default" drops the first token, as stock LLaVA does; "full" keeps every token; "patches" drops
            all that stand in front of the patches.
        connector: How many vectors the connector makes of a view.
        is_joined: Whether the connector reads all views of an image as one sequence.
        tiles: How an image is cut into views; None for one view of the whole.
        num_features: Of a view, where several encoders see it, which no single grid of patches says.
    """

    image_size: int
    patch_size: int
    num_prefix_tokens: int
    feature_select: str
    connector: LengthRule = EACH
    is_joined: bool = False
    tiles: TileRule | None = None
    num_features: int | None = None

    kind = "image"

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "ImageTokenRule":
        """A rule from plain values, as JSON holds them."""
        tiles = None if fields.get("tiles") is None else TileRule.from_fields(fields["tiles"])
        return cls(**{**fields, "connector": LengthRule(**fields["connector"]), "tiles": tiles})

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_dropped(self) -> int:
        """Tokens in front that are no features."""
        return {"default": 1, "full": 0, "patches": self.num_prefix_tokens}[self.feature_select]

    @property
    def most_views(self) -> int | None:
        """How many views an image has at most."""
        return 1 if self.tiles is None else self.tiles.most_views

    def views(self, size: MediaSize) -> tuple[int, ...]:
        """The features of each view of an image of this height and width.

        Every geometry (pad, crop, squash) makes a square of the encoder's native size first; tiles are such squares.

        Raises:
            RowError: It has no pixels, where they are to be cut into tiles.
        """
        features = self.num_features or self.grid**2 + self.num_prefix_tokens - self.num_dropped
        return (features,) * (1 if self.tiles is None else self.tiles.num_views(_sides(size), self.image_size))

    def arranged(self, size: MediaSize, lengths: tuple[int, ...]) -> int:
        """How many tokens connected views of these lengths become."""
        return sum(lengths) if self.tiles is None else self.tiles.arranged(_sides(size), lengths, self.image_size)


def _sides(size: MediaSize) -> Grid:
    height, width = (int(side) for side in size[:2])
    return height, width
