"""FastV: behind the first layers, only the visual tokens that the end of the question looks at.

After Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models", ECCV 2024, arXiv 2403.06764.
"""

from dataclasses import dataclass
from typing import ClassVar

from mllm.pruning.base import Cut, Row, Selection, top
from mllm.pruning.between_layers import BetweenLayers, paid_by_last


@dataclass
class FastV(BetweenLayers):
    """Ranks visual tokens by what the last token of the prompt pays them, in the layer before they leave.

    `tokens` is the average over layers: the first `layer` of them see all, and the others as many as make up the
    average, rounded down. So the paper's settings in 32 layers, K = 2 and R of 25, 50 and 75 %, are `tokens` of
    0.765625, 0.53125 and 0.296875.

    Args:
        layer: In front of which layer they leave, counted from 0: the paper's K. Layer K - 1 decides.
    """

    layer: int = 2

    reads_text: ClassVar[bool] = True

    def cuts(self, num_layers: int) -> tuple[Cut, ...]:
        """See `Pruner.cuts`."""
        return self.cuts_at([self.layer], num_layers, scored=1)

    def choose(self, row: Row, number: int, count: int) -> Selection:
        """See `BetweenLayers.choose`."""
        return Selection(top(paid_by_last(row)[row.items[number]], count))
