"""DivPrune: the tokens that differ most from each other."""

from dataclasses import dataclass

import torch

from mllm.pruning.base import Item, Pruner, Selection
from mllm.shapes import Int, MediaVectors, Tensor


@dataclass
class DivPrune(Pruner):
    """Keeps tokens so that the two most similar of them are as different as may be (Alvar et al., CVPR 2025).

    Looks at the vectors alone, and so at any model's. One token is chosen after the other: on a GPU many small steps.
    """

    def select(self, item: Item, num_layers: int) -> Selection:
        """See `Pruner.select`."""
        return Selection(most_different(item.vectors, self.budget(len(item.vectors))))


@torch.no_grad()
def most_different(vectors: MediaVectors, count: int) -> Int[Tensor, " n"]:
    """Places of so many vectors, in ascending order, chosen greedily by cosine distance.

    First the one whose nearest other is farthest; then, again and again, the one whose nearest among those chosen is
    farthest.
    """
    exact = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    units = torch.nn.functional.normalize(exact, dim=-1)
    distances = (1 - units @ units.T).fill_diagonal_(torch.inf)
    chosen = distances.amin(dim=1).argmax(dim=0, keepdim=True)
    nearest = distances.new_full((len(vectors),), torch.inf)
    places = []
    for _ in range(count):
        places.append(chosen)
        nearest = torch.minimum(nearest, distances.index_select(0, chosen)[0])
        nearest.index_fill_(0, chosen, -torch.inf)  # and so it stays: none is chosen twice, not even of equal ones
        chosen = nearest.argmax(dim=0, keepdim=True)
    return torch.cat(places).sort().values
