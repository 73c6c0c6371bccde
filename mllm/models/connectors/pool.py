"""The mean of neighbours, then an MLP: over time as AudioFlamingo 3 and Qwen2-Audio, or over a grid of patches.

Of those two the encoder ends with the mean and a LayerNorm, and the projector has two layers or one; here all of it is
the connector (`norm: true`), behind the encoder's last block.
"""

from dataclasses import dataclass

from mllm.models.connectors.merging import MergingConnector, MergingOptions, grid_windows, sequence_windows
from mllm.sizes import LengthRule

OVER = ("sequence", "grid")


@dataclass(frozen=True)
class PoolOptions(MergingOptions):
    """Options of `PoolConnector`.

    Args:
        over: "sequence" for features that follow one another, "grid" for a square of patches.
        keeps_incomplete: Whether an incomplete last window of a sequence becomes a vector, the mean of what it has.
            Stock models drop it; the only one of a sequence is kept in any case. On a grid incomplete squares count.
    """

    over: str = "sequence"
    keeps_incomplete: bool = True

    def __post_init__(self):
        self.check("over", self.over in OVER, f"one of {', '.join(OVER)}")
        super().__post_init__()

    def length_rule(self) -> LengthRule:
        """One vector of each window."""
        if self.over == "grid":
            return LengthRule("grid", size=self.size)
        return LengthRule("windows", size=self.size, rounds_up=self.keeps_incomplete)


class PoolConnector(MergingConnector):
    """Averages windows of neighbours."""

    Options = PoolOptions

    def merge(self, features, lengths):
        """The mean of those features of each window that count."""
        if self.options.over == "grid":
            assert lengths is None, "all features of a grid count"
            windows = grid_windows(features, self.options.size)
        else:
            windows = sequence_windows(features, lengths, self.options.size)
        return windows.features.sum(2) / windows.counts[..., None].to(features.dtype)
