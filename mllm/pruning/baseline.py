"""What baselines share: they need no scores, and so can choose in front of the language model or of a later layer."""

from dataclasses import dataclass

from mllm.pruning.base import Cut, Pruner
from mllm.pruning.between_layers import BetweenLayers


@dataclass
class Baseline(BetweenLayers):
    """Keeps tokens whatever they show; `select` and `choose` say which.

    Args:
        layer: In front of which layer tokens leave, counted from 0. To compare with methods that cut between layers:
            the layers before it see all, and the others as many as make up the average.
    """

    layer: int = 0

    def cuts(self, num_layers: int) -> tuple[Cut, ...]:
        """See `Pruner.cuts`."""
        return self.cuts_at([self.layer], num_layers, scored=0) if self.layer != 0 else ()

    def counts(self, num_tokens: int, num_layers: int) -> list[int]:
        """See `Pruner.counts`."""
        if self.layer == 0:
            return Pruner.counts(self, num_tokens, num_layers)
        return super().counts(num_tokens, num_layers)
