"""What the reference model said of every pair, where it was asked before the run."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mllm.errors import CheckpointError
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

    def __len__(self) -> int:
        return len(self._places)

    def __call__(self, position: int) -> list[float]:
        """What is known of the pair of a row.

        Raises:
            CheckpointError: Nothing is: its media could not be read when the reference was asked, and now they can.
        """
        place = self._places.get(position)
        if place is None:
            raise CheckpointError(
                f"the reference's log-probabilities lack row {position}, which could not be read when it was asked",
                expected="data that nobody mends while a run goes on",
                do="start the run again: the reference is asked anew, as the data have changed",
            )
        return self._values[place].tolist()


class KnownReference(NamedTuple):
    """What the reference said of the pairs that are trained on, and of those that are validated on."""

    training: ReferenceLogProbs
    validation: ReferenceLogProbs | None = None
