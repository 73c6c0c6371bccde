"""A baseline: tokens at equal distances."""

from dataclasses import dataclass

from mllm.pruning.base import Item, Row, Selection
from mllm.pruning.baseline import Baseline
from mllm.pruning.budgets import evenly, evenly_on_grid


@dataclass
class Uniform(Baseline):
    """Keeps tokens at equal distances from each other, whatever they show.

    Where the tokens of an item stand on grids, they are spread over views (or frames), lines and columns; else, and
    in front of later layers, along their sequence.
    """

    def select(self, item: Item, num_layers: int) -> Selection | None:
        """See `Pruner.select`."""
        if self.layer != 0:
            return None
        num_tokens = len(item.vectors)
        count = self.budget(num_tokens)
        places = evenly(num_tokens, count) if item.grid is None else evenly_on_grid(item.grid, count)
        return Selection(places.to(item.vectors.device))

    def choose(self, row: Row, number: int, count: int) -> Selection:
        """See `BetweenLayers.choose`."""
        return Selection(evenly(len(row.items[number]), count).to(row.hidden.device))
