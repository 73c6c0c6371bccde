"""Labels out of loss weights. Pure."""

from collections.abc import Sequence

IGNORED = -100


def labels_of(input_ids: Sequence[int], loss_weights: Sequence[float]) -> list[int]:
    """The ids where something is learned, -100 elsewhere.

    Example: ids [7, 8, 9] with weights [0, 0.5, 1] give [-100, 8, 9].
    """
    return [token if weight > 0 else IGNORED for token, weight in zip(input_ids, loss_weights, strict=True)]


def has_uneven_weights(loss_weights: Sequence[float]) -> bool:
    """Whether some weight is neither 0 nor 1, so that the weights have to travel with the batch."""
    return any(weight not in (0.0, 1.0) for weight in loss_weights)
