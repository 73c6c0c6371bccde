"""Token merging by bipartite matching, of the vectors in front of the language model."""

from dataclasses import dataclass

import torch

from mllm.pruning.base import Item, Pruner, Selection, top
from mllm.shapes import Float, Int, MediaVectors, Tensor


@dataclass
class ToMe(Pruner):
    """Merges tokens that are alike, pair by pair, until the budget is met (after Bolya et al., ICLR 2023).

    In each round the tokens are dealt alternately to two sets. Each of the first set names the most similar of the
    second, and the most similar pairs become one token each, at the place of the second: the mean of all tokens that
    went into it. Published for the layers of an encoder, by their keys, with attention in proportion to sizes; here
    the vectors that enter the language model are merged, by their own similarity, so any connector will do.

    Args:
        merged_at_once: Which share of the tokens at hand a round merges away at most. Smaller shares, more rounds,
            better pairs.
    """

    merged_at_once: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        self.check("merged_at_once", 0 < self.merged_at_once <= 0.5, "above 0, to 0.5: two tokens become one")

    def select(self, item: Item, num_layers: int) -> Selection:
        """See `Pruner.select`."""
        vectors = item.vectors
        wanted = self.budget(len(vectors))
        values = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        sizes = values.new_ones(len(values))
        places = torch.arange(len(values), device=values.device)
        lives_in = places
        while len(values) > wanted:
            at_once = max(int(self.merged_at_once * len(values)), 1)
            into = bipartite_matches(values, min(at_once, len(values) - wanted))
            values, sizes, left = merged(values, sizes, into)
            places = places[left]
            lives_in = torch.searchsorted(left, into[lives_in])
        return Selection(places, values, lives_in)


@torch.no_grad()
def bipartite_matches(values: MediaVectors, count: int) -> Int[Tensor, " n"]:
    """Of each token the one that it lives on in: another one for `count` of them, else itself.

    Tokens at even places may go, each into the most similar (cosine) at an odd place.
    """
    units = torch.nn.functional.normalize(values, dim=-1)
    similarity, partners = (units[0::2] @ units[1::2].T).max(dim=1)
    leaving = top(similarity, count)
    into = torch.arange(len(values), device=values.device)
    return into.index_put((2 * leaving,), 2 * partners[leaving] + 1)


def merged(
    values: Float[Tensor, "n D"], sizes: Float[Tensor, " n"], into: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "m D"], Float[Tensor, " m"], Int[Tensor, " m"]]:
    """The tokens that are left with what was merged into them, how many each stands for, and which they are.

    Args:
        values: Of each token.
        sizes: How many it stands for already.
        into: Which it lives on in, itself if it stays.
    """
    left = (into == torch.arange(len(into), device=into.device)).nonzero()[:, 0]
    sums = torch.zeros_like(values).index_add(0, into, values * sizes[:, None])[left]
    numbers = torch.zeros_like(sizes).index_add(0, into, sizes)[left]
    return sums / numbers[:, None], numbers, left
