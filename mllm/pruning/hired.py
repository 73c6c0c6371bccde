"""HiRED: what the class token attends to, and more of the tiles in which there is more to see."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mllm.pruning.base import Item, Pruner, Selection, top
from mllm.pruning.budgets import apportioned
from mllm.pruning.evidence import Evidence, told
from mllm.shapes import Float, Int, Tensor


@dataclass
class HiRED(Pruner):
    """Deals the budget out to the views of a picture, and keeps in each what the class token attends to most.

    After Arif et al., AAAI 2025. A part goes to the overview; the tiles get the rest by how many of the overview's
    most attended patches, in the encoder's first layer, lie in each. A picture in one view keeps its most attended
    patches. Tiles of which it is not known where in the picture they are, and frames, get parts as large as they are.

    Args:
        overview: Which share of the budget the overview gets. The other share of its patches is what is counted as
            its most attended ones.
    """

    overview: float = 0.5

    encoder_layers: ClassVar[tuple[int, ...]] = (0, -1)

    def __post_init__(self):
        super().__post_init__()
        self.check("overview", 0 < self.overview < 1, "a share between 0 and 1")

    def select(self, item: Item, num_layers: int) -> Selection:
        """See `Pruner.select`."""
        evidence = told(item.evidence, by="HiRED", unread=item.unread)
        scores = evidence.of_vectors(evidence.class_attention(), without=-torch.inf)
        wanted = self.budget(len(scores))
        room = evidence.room_of_views()
        if wanted >= sum(room):  # vectors of no patch have no attention: they come last
            return Selection(top(scores, wanted))
        budgets = self._budgets(evidence, room, wanted)
        return Selection(_top_of_views(scores, evidence.views, budgets))

    def _budgets(self, evidence: Evidence, room: list[int], wanted: int) -> list[int]:
        """How many tokens each view keeps."""
        if evidence.overview is None:
            return apportioned(wanted, room, room)
        own = evidence.overview
        room_of_tiles = [*room[:own], *room[own + 1 :]]
        of_overview = max(min(round(self.overview * wanted), room[own]), wanted - sum(room_of_tiles))
        weights = room_of_tiles
        if evidence.tiles is not None:
            first_layer = evidence.class_attention(0).view(evidence.num_views, -1)[own]
            weights = most_attended(first_layer, 1 - self.overview, evidence.tiles)
        of_tiles = apportioned(wanted - of_overview, weights, room_of_tiles)
        return [*of_tiles[:own], of_overview, *of_tiles[own:]]


def most_attended(scores: Float[Tensor, " patches"], share: float, tiles: tuple[int, int]) -> list[int]:
    """How many of an overview's patches of the highest scores lie where each tile is.

    Args:
        scores: Of the patches, line by line of a square.
        share: How many are counted.
        tiles: Rows and columns, over which the overview is taken to be spread.
    """
    (rows, columns), side = tiles, round(len(scores) ** 0.5)
    places = top(scores, round(share * len(scores)))
    # In which tile the middle of a patch lies.
    row = (2 * (places // side) + 1) * rows // (2 * side)
    column = (2 * (places % side) + 1) * columns // (2 * side)
    return torch.bincount(row * columns + column, minlength=rows * columns).tolist()


def _top_of_views(scores: Float[Tensor, " V"], views: Int[Tensor, " V"], budgets: list[int]) -> Int[Tensor, " n"]:
    places = [(views == view).nonzero()[:, 0] for view in range(len(budgets))]
    return torch.cat([own[top(scores[own], count)] for own, count in zip(places, budgets, strict=True)]).sort().values
