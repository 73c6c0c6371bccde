"""What the connectors share that make one vector of several neighbours, and then project it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from mllm.models.connectors.base import counted_features
from mllm.models.connectors.mlp import MlpConnector, MlpOptions
from mllm.shapes import Float, Int, Tensor
from mllm.sizes.lengths import square_side


class Windows(NamedTuple):
    """Features in windows of neighbours.

    Args:
        features: Those of each window, in order; zeros where it is incomplete.
        counts: How many of each window's count; at least 1, so that one can divide by it.
    """

    features: Float[Tensor, "N V K D"]
    counts: Int[Tensor, "#N V"]


@dataclass(frozen=True)
class MergingOptions(MlpOptions):
    """Options of connectors that merge neighbours.

    Args:
        size: Neighbours that become one vector; on a grid the cells along each side of a square.
        norm: Whether a LayerNorm stands in front of the first linear layer.
    """

    size: int = 2
    norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.check("size", self.size >= 1, "1 or more")
        on_grid = self.length_rule().kind == "grid"
        self.check("per", not (on_grid and self.per == "item"), "view: the neighbours on a grid are those of one view")


class MergingConnector(MlpConnector):
    """Merges neighbours, then an MLP. A subclass says how, in `merge`."""

    Options = MergingOptions

    def __init__(self, options: MergingOptions, **sizes: Any):
        super().__init__(options, **sizes)
        self.layer_norm = nn.LayerNorm(self.in_size * options.num_joined) if options.norm else None

    def connect(self, features, lengths, question):
        """Merge, then project."""
        merged = self.merge(features, lengths)[:, : self.length_rule.count(features.shape[1])]
        return self.project(merged if self.layer_norm is None else self.layer_norm(merged))

    def merge(
        self, features: Float[Tensor, "N L D_in"], lengths: Int[Tensor, " N"] | None
    ) -> Float[Tensor, "N V D_joined"]:
        """One vector of each window of neighbours; the last may be incomplete."""
        raise NotImplementedError


def sequence_windows(features: Float[Tensor, "N L D"], lengths: Int[Tensor, " N"] | None, size: int) -> Windows:
    """Features that follow one another, in windows of `size`; what stands behind the end of each counts for nothing.

    Example: five features in windows of two are three windows, of which the last has one that counts.
    """
    missing = -features.shape[1] % size
    counted = counted_features(features, lengths)
    features = torch.where(counted[..., None], features, 0.0)
    features = nn.functional.pad(features, (0, 0, 0, missing)).unflatten(1, (-1, size))
    counts = nn.functional.pad(counted.long(), (0, missing)).unflatten(1, (-1, size)).sum(-1)
    return Windows(features, counts.clamp(min=1))


def grid_windows(features: Float[Tensor, "N L D"], size: int) -> Windows:
    """Features on a square grid, row after row, in windows of `size` x `size` cells; those at the end may lack some.

    Example: a grid of 3 x 3 in windows of 2 x 2 has four windows, of which the last has one cell that counts.

    Raises:
        OptionError: They are no square.
    """
    side = square_side(features.shape[1])
    missing = -side % size

    def windows(cells: Tensor) -> Tensor:
        cells = nn.functional.pad(cells.unflatten(1, (side, side)), (0, 0, 0, missing, 0, missing))
        cells = cells.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # [N, rows, size, columns, size, D]
        return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    counts = windows(features.new_ones(1, side * side, 1, dtype=torch.long)).sum((2, 3))
    return Windows(windows(features), counts)
