"""A baseline: tokens at equal distances."""

from dataclasses import dataclass

import torch

from mllm.pruning.base import Item, Pruner, Selection
from mllm.shapes import Int, Tensor


@dataclass
class Uniform(Pruner):
    """Keeps tokens at equal distances from each other, whatever they show."""

    def select(self, item: Item, num_layers: int) -> Selection:
        """See `Pruner.select`."""
        return Selection(evenly(len(item.vectors), self.budget(len(item.vectors))).to(item.vectors.device))


def evenly(num_tokens: int, count: int) -> Int[Tensor, " n"]:
    """So many places among so many, in the middles of equal stretches."""
    return ((torch.arange(count) + 0.5) * num_tokens / count).long()
