"""SparseVLM: words that speak of the picture rate its tokens, and some of those that leave live on in clusters.

After Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025,
arXiv 2410.04417, in the form of the first version of the authors' code.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from mllm.pruning.base import Cut, Embedded, Row, Selection, top
from mllm.pruning.between_layers import BetweenLayers
from mllm.pruning.clustering import density_peaks
from mllm.shapes import Float, Int, Tensor

PAPER_LAYERS, PAPER_DEPTH = (3, 7, 16), 32
"""In front of which layers tokens leave in the authors' code, and of how many: behind the third, the seventh ..."""
OF_EACH_GROUP = 10


@dataclass
class SparseVLM(BetweenLayers):
    """Ranks visual tokens by what the raters pay them, in the layer before they leave.

    Raters are the text tokens behind a picture on which its tokens, as they enter the language model, agree: those to
    which a softmax of their products gives more than the mean. Where none is above the mean, all of them rate; where
    no text follows, the last token does. The best of the tokens that leave are grouped, and each group's mean stands
    where its centre stood, or behind the tokens that stay where positions are counted anew, as in the authors' code.

    `tokens` is the average over layers, groups among them, met by one ratio between neighbouring stretches of layers;
    the paper adapts its numbers to the rank of the attention, its code has tables of them (`kept`).

    Args:
        layers: In front of which layers tokens leave, counted from 0; None for those of the paper (3, 7 and 16 of 32)
            in proportion to the depth.
        kept: How many tokens stay as they are behind each cut, groups not counted, whatever `tokens` says: the
            authors have (300, 200, 110) for an average of 192 of 576, (303, 110, 36) for 128 and (66, 30, 17) for 64;
            None for as many as `tokens` allows.
        recycled: Which share of the tokens that leave lives on in groups, one for each ten of them; 0 for none.
    """

    positions: str = "compacted"
    layers: tuple[int, ...] | None = None
    kept: tuple[int, ...] | None = None
    recycled: float = 0.3

    reads_text: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.check("kept", self.kept is None or min(self.kept, default=0) >= 1, "numbers from 1, one for each cut")
        self.check("recycled", 0 <= self.recycled <= 1, "a share from 0 to 1")

    def cuts(self, num_layers: int) -> tuple[Cut, ...]:
        """See `Pruner.cuts`."""
        layers = _in_proportion(num_layers) if self.layers is None else self.layers
        is_fine = self.kept is None or len(self.kept) == len(layers)
        self.check("kept", is_fine, f"{len(layers)} numbers, for the cuts in front of the layers {list(layers)}")
        return self.cuts_at(layers, num_layers, scored=1)

    def left(self, num_tokens: int, num_layers: int) -> list[int]:
        """See `BetweenLayers.left`."""
        return [num_kept + num_groups for num_kept, num_groups in self._parts(num_tokens, num_layers)]

    def select_at_cut(self, row: Row, cut: int, entered: tuple[int, ...], num_layers: int) -> list[Selection | None]:
        """See `Pruner.select_at_cut`."""
        assert row.embedded is not None
        selections: list[Selection | None] = []
        for number, item in enumerate(row.items):
            num_kept, num_groups = self._parts(entered[number], num_layers)[cut]
            if num_kept >= len(item):
                selections.append(None)
                continue
            scores = row.attention(_places(row, raters_of(row.embedded, number)))[..., item].mean(dim=(0, 1))
            selections.append(self._selection(row.hidden[item], scores, num_kept, num_groups))
        return selections

    def _selection(
        self, hidden: Float[Tensor, "V D"], scores: Float[Tensor, " V"], num_kept: int, num_groups: int
    ) -> Selection:
        kept = top(scores, num_kept)
        if num_groups == 0:
            return Selection(kept)
        of_others = scores.index_fill(0, kept, float("-inf"))
        recycled = top(of_others, self._num_recycled(len(scores) - num_kept))
        values = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        clusters = density_peaks(values[recycled], num_groups)
        is_of = functional.one_hot(clusters.joined, num_groups).T.to(values.dtype)
        means = is_of @ values[recycled] / is_of.sum(dim=1, keepdim=True)
        into = torch.full_like(scores, -1, dtype=torch.long)
        into[kept] = torch.arange(num_kept, device=kept.device)
        into[recycled] = clusters.joined + num_kept
        return Selection(torch.cat([kept, recycled[clusters.centres]]), torch.cat([values[kept], means]), into)

    def _parts(self, num_tokens: int, num_layers: int) -> list[tuple[int, int]]:
        """Behind each cut: how many tokens stay as they are, and how many groups stand beside them."""
        parts, here = [], num_tokens
        if self.kept is not None:
            for most in self.kept:
                num_kept = min(most, here)
                parts.append((num_kept, self._num_groups(here - num_kept)))
                here = sum(parts[-1])
            return parts
        for total in super().left(num_tokens, num_layers):
            fitting = (one for one in range(total, 0, -1) if one + self._num_groups(here - one) <= total)
            num_kept = next(fitting, 1)
            parts.append((num_kept, total - num_kept))
            here = total
        return parts

    def _num_recycled(self, num_leaving: int) -> int:
        return min(math.floor(self.recycled * num_leaving) + 1, num_leaving) if self.recycled else 0

    def _num_groups(self, num_leaving: int) -> int:
        num_recycled = self._num_recycled(num_leaving)
        return num_recycled // OF_EACH_GROUP + 1 if num_recycled else 0


def raters_of(embedded: Embedded, number: int) -> Int[Tensor, " n"]:
    """Which text tokens of a row rate an item, counted among its text tokens; none where no text stands behind it.

    Args:
        embedded: The row's tokens.
        number: The item's, among the row's.
    """
    item = embedded.items[number]
    is_text = torch.ones(len(embedded.vectors), dtype=torch.bool, device=item.device)
    is_text[torch.cat(embedded.items)] = False
    text = is_text.nonzero()[:, 0]
    behind = (text > item[-1]).nonzero()[:, 0]
    vectors = embedded.vectors.to(torch.promote_types(embedded.vectors.dtype, torch.float32))
    share = (vectors[item] @ vectors[text[behind]].T).softmax(dim=1).mean(dim=0)
    is_rater = share > share.mean()
    return behind[is_rater] if bool(is_rater.any()) else behind


def _places(row: Row, raters: Int[Tensor, " n"]) -> Int[Tensor, " m"]:
    """Where those of a row's text tokens stand; its last token in place of none."""
    if len(raters) == 0:
        return torch.tensor([len(row.hidden) - 1], device=raters.device)
    return (~row.is_visual).nonzero()[:, 0][raters]


def _in_proportion(num_layers: int) -> tuple[int, ...]:
    """The layers of the paper, in a model of another depth; each once, and none in front of the first layer."""
    return tuple(sorted({max(1, round(layer * num_layers / PAPER_DEPTH)) for layer in PAPER_LAYERS}))
