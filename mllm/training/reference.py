"""What the reference model says of every pair, computed once and kept on disk."""

from collections.abc import Sequence

import torch

from mllm.shapes import Float, Tensor


class ReferenceLogProbs:
    """Log-probabilities of the sides of pairs, by the position of their row in the mixture.

    Args:
        positions: Of the rows.
        values: Of each, side by side.
    """

    def __init__(self, positions: Sequence[int], values: Float[Tensor, "rows sides"]):
        self._places = {position: place for place, position in enumerate(positions)}
        self._values = values.to(torch.float32)

    def __call__(self, position: int) -> list[float]:
        """What is known of the pair of a row."""
        return self._values[self._places[position]].tolist()
