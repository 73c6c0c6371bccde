"""How the vectors of media came to be: which patches of which views are behind each."""

from collections.abc import Callable
from dataclasses import dataclass

from mllm.pruning.patches import Patches
from mllm.pruning.scoring import QueriesKeys
from mllm.shapes import EncoderFeatures, Tensor


@dataclass(frozen=True)
class SeenItem:
    """Where one item stands among the views of an encoding.

    Args:
        views: Its views.
        patches: Which of its patches each of its vectors stands for, see `Evidence.patches`; None where that cannot
            be told, since its connector mixes them.
        grid: See `Item.grid`.
        overview: Which of its views shows the whole where the others are its tiles; None where none does.
        tiles: Rows and columns of those tiles; None where that is not known.
    """

    views: slice
    patches: Patches | None
    grid: tuple[int, int, int] | None
    overview: int | None = None
    tiles: tuple[int, int] | None = None


@dataclass(frozen=True)
class Encoding:
    """The media of one modality that went through encoder and connector together.

    Args:
        num_views: Of all items.
        num_prefix_tokens: Of the encoder's tokens, those in front of the patches.
        items: One by one.
        features: What the connector read of the patches [views, patches, D_encoder], where it turns each into a vector
            by itself; else None.
        connect: That connector, for features of any patches [n, D_encoder].
        unread: Why its encoder tells nothing of its patches; None where it does.
        parted: Of encoders that read all items as one sequence: parts what was read by item.
    """

    num_views: int
    num_prefix_tokens: int
    items: list[SeenItem]
    features: EncoderFeatures | None = None
    connect: Callable[[Tensor], Tensor] | None = None
    unread: str | None = None
    parted: Callable[[QueriesKeys], list[QueriesKeys]] | None = None


MIXING = "its connector mixes all patches in every vector"
"""Why there is no evidence of a Q-Former's vectors."""


def square_grid(num_views: int, num_vectors: int) -> tuple[int, int, int] | None:
    """Views, rows and columns of vectors that stand in squares; None for such as cannot."""
    side = round((num_vectors / num_views) ** 0.5)
    return (num_views, side, side) if num_views * side * side == num_vectors else None
