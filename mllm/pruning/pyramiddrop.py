"""PyramidDrop: a share of the visual tokens leaves at each of a few layers, until few are left in the last ones.

After Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", CVPR 2025, arXiv 2410.17247.
"""

from dataclasses import dataclass
from typing import ClassVar

from mllm.pruning.base import Cut, Row, Selection, top
from mllm.pruning.between_layers import BetweenLayers, paid_by_last
from mllm.pruning.schedules import starts_of

NUM_STRETCHES = 4
"""Of layers, as in the paper."""


@dataclass
class PyramidDrop(BetweenLayers):
    """Ranks visual tokens at each cut by what the last token of the prompt would pay them in the layer behind it.

    `tokens` is the average over layers, met by one ratio between neighbouring stretches of layers. The paper's
    setting, half of the tokens from stretch to stretch, is the average of 270 of 576, or 0.46875 of any number.
    Positions are counted anew behind each cut, as in the authors' code.

    Args:
        layers: In front of which layers tokens leave, counted from 0; None to leave at a quarter, a half and three
            quarters of the depth (8, 16 and 24 of 32), or at each layer of a model of fewer than four.
    """

    positions: str = "compacted"
    layers: tuple[int, ...] | None = None

    reads_text: ClassVar[bool] = True

    def cuts(self, num_layers: int) -> tuple[Cut, ...]:
        """See `Pruner.cuts`."""
        layers = starts_of(num_layers, NUM_STRETCHES)[1:] if self.layers is None else self.layers
        return self.cuts_at(layers, num_layers, scored=0)

    def choose(self, row: Row, number: int, count: int) -> Selection:
        """See `BetweenLayers.choose`."""
        return Selection(top(paid_by_last(row)[row.items[number]], count))
