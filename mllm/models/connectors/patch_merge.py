"""Pixel shuffle, then an MLP: squares of neighbouring patches side by side in one vector (InternVL, arXiv 2404.16821).

With two linear layers and the text width this is InternVL's projector, weight for weight.
"""

from dataclasses import dataclass

from mllm.models.connectors.merging import MergingConnector, MergingOptions, grid_windows
from mllm.sizes import LengthRule


@dataclass(frozen=True)
class PatchMergeOptions(MergingOptions):
    """Options of `PatchMergeConnector`."""

    norm: bool = True

    def length_rule(self) -> LengthRule:
        """One vector of each square; incomplete squares count."""
        return LengthRule("grid", size=self.size)

    @property
    def num_joined(self) -> int:
        """Patches of a square."""
        return self.size**2


class PatchMergeConnector(MergingConnector):
    """Joins the channels of `size` x `size` patches; zeros take the place of patches beyond the edge."""

    Options = PatchMergeOptions

    def merge(self, features, lengths):
        """Patches of a square, row after row, in one vector."""
        assert lengths is None, "all features of a grid count"
        return grid_windows(features, self.options.size).features.flatten(2)
