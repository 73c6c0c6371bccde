"""A baseline: tokens by chance."""

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from mllm.pruning.anatomy import Anatomy
from mllm.pruning.base import Item, Row, Selection
from mllm.pruning.baseline import Baseline
from mllm.shapes import Int, Shaped, Tensor


@dataclass
class Random(Baseline):
    """Keeps tokens by chance, of each picture or video others.

    The same of the first, the second and so on that are shown in its context, however they are batched; in front of
    later layers, the same of each prompt's first, second and so on, so that beams and repetitions of a prompt agree.

    Args:
        seed: Other seeds, other tokens.
    """

    seed: int = 0
    num_shown: int = field(default=0, init=False, repr=False, compare=False)
    """Items since the context was entered."""

    def take_hold(self, anatomy: Anatomy, stack: ExitStack) -> None:
        """See `Pruner.take_hold`."""
        self.num_shown = 0

    def select(self, item: Item, num_layers: int) -> Selection | None:
        """See `Pruner.select`."""
        if self.layer != 0:
            return None
        self.num_shown += 1
        return Selection(self._drawn(self.num_shown - 1, item.vectors, self.budget(len(item.vectors))))

    def choose(self, row: Row, number: int, count: int) -> Selection:
        """See `BetweenLayers.choose`."""
        return Selection(self._drawn(number, row.items[number], count))

    def _drawn(self, number: int, tokens: Shaped[Tensor, "V ..."], count: int) -> Int[Tensor, " n"]:
        """Places among an item's tokens."""
        chance = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        return torch.randperm(len(tokens), generator=chance)[:count].sort().values.to(tokens.device)
