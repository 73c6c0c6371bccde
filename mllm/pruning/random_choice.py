"""A baseline: tokens by chance."""

from dataclasses import dataclass

import torch

from mllm.pruning.base import Item, Pruner, Selection


@dataclass
class Random(Pruner):
    """Keeps tokens by chance, the same of the same item whatever was asked before.

    Args:
        seed: Other seeds, other tokens.
    """

    seed: int = 0

    def select(self, item: Item, num_layers: int) -> Selection:
        """See `Pruner.select`."""
        num_tokens = len(item.vectors)
        chance = torch.Generator().manual_seed(self.seed)
        kept = torch.randperm(num_tokens, generator=chance)[: self.budget(num_tokens)].sort().values
        return Selection(kept.to(item.vectors.device))
