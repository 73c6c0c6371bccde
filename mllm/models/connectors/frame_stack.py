"""Neighbours in time side by side in one vector, then an MLP: the connector of Voxtral (arXiv 2507.13264)."""

from dataclasses import dataclass

from mllm.models.connectors.merging import MergingConnector, MergingOptions, sequence_windows
from mllm.sizes import LengthRule


@dataclass(frozen=True)
class FrameStackOptions(MergingOptions):
    """Options of `FrameStackConnector`."""

    size: int = 4
    bias: bool = False

    def length_rule(self) -> LengthRule:
        """One vector of each window; an incomplete one counts."""
        return LengthRule("windows", size=self.size)

    @property
    def num_joined(self) -> int:
        """Features of a window."""
        return self.size


class FrameStackConnector(MergingConnector):
    """Joins the channels of `size` features that follow one another; zeros stand behind the last one that counts."""

    Options = FrameStackOptions

    def merge(self, features, lengths):
        """Features of a window, in order, in one vector."""
        return sequence_windows(features, lengths, self.options.size).features.flatten(2)
