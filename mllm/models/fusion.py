"""Where two streams meet: encoded media take the place of their placeholders. Pure functions."""

from mllm.errors import RowError
from mllm.shapes import Bool, Float, MediaVectors, Tensor, TokenIds


def placeholder_mask(input_ids: TokenIds, placeholder_id: int, *, num_features: int) -> Bool[Tensor, "B T"]:
    """Find the placeholders and check that there is exactly one for every feature vector.

    Raises:
        RowError: The batch holds more or fewer placeholders than features.
    """
    mask = input_ids == placeholder_id
    found = int(mask.sum())
    if found != num_features:
        raise RowError(
            f"{found} placeholder tokens (id {placeholder_id}) for {num_features} feature vectors",
            expected="one placeholder for every feature vector",
            do="prepare text and media with one processor, that of this checkpoint, and do not truncate its ids",
        )
    return mask


def scatter_features(
    embeds: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"], features: MediaVectors
) -> Float[Tensor, "B T D"]:
    """Put the features, in order of appearance, where `mask` is true.

    Example: mask [[0, 1, 1], [0, 0, 1]] takes features [f0, f1, f2] as [[e, f0, f1], [e, e, f2]].
    """
    return embeds.masked_scatter(mask.unsqueeze(-1), features.to(embeds.device, embeds.dtype))
