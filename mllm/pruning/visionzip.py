"""VisionZip: what the class token attends to, and a few tokens into which the rest is merged."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mllm.pruning.base import Item, Pruner, Selection, top
from mllm.pruning.budgets import apportioned
from mllm.pruning.evidence import Evidence, told
from mllm.pruning.merge import Groups, groups_around_even_targets, merged_into, targets_plus_means
from mllm.shapes import Float, Int, MediaVectors, Tensor


@dataclass
class VisionZip(Pruner):
    """Keeps the patches that are attended to most, and merges the others into a few (Yang et al., CVPR 2025).

    Views (tiles, frames) get parts of the budget as large as they are, and each is reduced by itself. Attention is the
    class token's, in the layer whose output the connector reads; of an encoder without one, what patches get from each
    other. The class token itself, which the published code keeps as one of its tokens, does not enter the language
    model: connectors have not learned to read it. To a merged token the mean of its group is added, as published: on
    features that go through the connector, where that turns each patch into a vector by itself; else on vectors.

    Args:
        contextual: Which share of the tokens is merged ones. As published: 10 of 64, 20 of 128, 30 of 192.
    """

    contextual: float = 10 / 64

    encoder_layers: ClassVar[tuple[int, ...]] = (-1,)

    def __post_init__(self):
        super().__post_init__()
        self.check("contextual", 0 <= self.contextual < 1, "a share from 0 to below 1")

    def select(self, item: Item, num_layers: int) -> Selection:
        """See `Pruner.select`."""
        evidence = told(item.evidence, by="VisionZip", unread=item.unread)
        has_class_token = evidence.num_prefix_tokens > 0
        attention = evidence.class_attention() if has_class_token else evidence.received_attention()
        scores = evidence.of_vectors(attention, without=-torch.inf)
        wanted, room = self.budget(len(scores)), evidence.room_of_views()
        if wanted >= sum(room):  # vectors of no patch have no attention: they come last
            return Selection(top(scores, wanted))
        keys = evidence.of_vectors(evidence.mean_keys())
        views = [
            self._chosen(scores, keys, (evidence.views == view).nonzero()[:, 0], count)
            for view, count in enumerate(apportioned(wanted, room, room))
        ]
        dominant = torch.cat([one for one, _ in views]).sort().values
        groups = _joined([one for _, one in views])
        if len(groups.targets) == 0:
            return Selection(dominant)
        kept = torch.cat([dominant, groups.targets])
        values = torch.cat([item.vectors[dominant], _contextual(item.vectors, evidence, groups)])
        return Selection(kept, values, merged_into(kept, groups, len(scores)))

    def _chosen(
        self, scores: Float[Tensor, " V"], keys: Float[Tensor, "V d"], own: Int[Tensor, " v"], count: int
    ) -> tuple[Int[Tensor, " n"], Groups]:
        """Of the vectors of one view, those that stay as they are, and what is merged into the others."""
        num_merged = round(self.contextual * count)
        places = top(scores[own], count - num_merged)
        rest = own[torch.ones_like(own, dtype=torch.bool).index_fill(0, places, value=False)]
        if num_merged == 0:
            return own[places], Groups(rest[:0], rest[:0], rest[:0])
        return own[places], groups_around_even_targets(keys, rest, num_merged)


def _joined(groups: list[Groups]) -> Groups:
    """The groups of all views, one view's targets behind the other's."""
    before = torch.tensor([0, *(len(one.targets) for one in groups)]).cumsum(0).tolist()
    return Groups(
        torch.cat([one.targets for one in groups]),
        torch.cat([one.members for one in groups]),
        torch.cat([one.joined + first for one, first in zip(groups, before, strict=False)]),
    )


def _contextual(vectors: MediaVectors, evidence: Evidence, groups: Groups) -> MediaVectors:
    if evidence.features is None or evidence.connect is None:
        return targets_plus_means(vectors, groups)
    merged = targets_plus_means(evidence.of_vectors(evidence.features), groups)
    return evidence.connect(merged).to(vectors.dtype)
