"""What an encoder tells of the patches behind the vectors of a media item: who attends to whom, and their keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mllm.errors import OptionError
from mllm.pruning.scoring import QueriesKeys
from mllm.shapes import Float, Int, Tensor


@dataclass(frozen=True)
class Evidence:
    """Of one item.

    Args:
        layers: Queries and keys [views, H, T, d] of some of the encoder's layers: 0 is the first, -1 the one whose
            output the connector reads. The first `num_prefix_tokens` of the T are no patches.
        num_prefix_tokens: Of which the first, where there is one, is the class token.
        patches: Which patches each vector stands for, counted through all views [V, p]; -1 for fewer. A vector of none
            (the end of a line of LLaVA-NeXT) is no patch.
        features: What the connector read of all patches, where it turns each patch into a vector by itself; else None.
        connect: The connector, for such features.
    """

    layers: Mapping[int, QueriesKeys]
    num_prefix_tokens: int
    patches: Int[Tensor, "V p"]
    features: Float[Tensor, "patches D_encoder"] | None = None
    connect: Callable[[Tensor], Tensor] | None = None

    @property
    def num_patches(self) -> int:
        """Of each view."""
        return next(iter(self.layers.values())).keys.shape[2] - self.num_prefix_tokens

    @property
    def is_patch(self) -> Tensor:
        """Which vectors stand for patches [V]."""
        return (self.patches >= 0).any(dim=1)

    def class_attention(self, layer: int = -1) -> Float[Tensor, " patches"]:
        """What the class token pays to each patch, as a sum over heads; softmax over all tokens of the view.

        Raises:
            OptionError: The encoder has no class token.
        """
        if self.num_prefix_tokens == 0:
            raise OptionError(
                "an encoder without a class token, whose attention was to rank the patches",
                expected="an encoder with one, such as CLIP or DINOv2",
                do="choose a pruner that needs none (visiondrop, divprune, random, uniform)",
            )
        queries, keys, scaling = self.layers[layer]
        scores = (queries[:, :, :1] @ keys.transpose(2, 3)).float() * scaling
        return scores.softmax(dim=-1)[:, :, 0, self.num_prefix_tokens :].sum(dim=1).flatten()

    def received_attention(self, layer: int = -1) -> Float[Tensor, " patches"]:
        """What each patch is paid by the patches of its view, as a mean over heads and patches."""
        queries, keys, scaling = self.layers[layer]
        scores = (queries[:, :, self.num_prefix_tokens :] @ keys.transpose(2, 3)).float() * scaling
        return scores.softmax(dim=-1)[..., self.num_prefix_tokens :].mean(dim=(1, 2)).flatten()

    def mean_keys(self, layer: int = -1) -> Float[Tensor, "patches d"]:
        """The key of each patch, as a mean over heads."""
        return self.layers[layer].keys[:, :, self.num_prefix_tokens :].mean(dim=1).flatten(0, 1)

    def of_vectors(self, values: Float[Tensor, "patches ..."], *, without: float = 0.0) -> Float[Tensor, "V ..."]:
        """What patches have, for vectors: the mean over the patches of each.

        Args:
            values: Of all patches.
            without: What vectors get that stand for no patch.
        """
        counts = self.patches.ge(0)
        weights = counts.to(values.dtype).view(*counts.shape, *[1] * (values.dim() - 1))
        sums = (values[self.patches.clamp(min=0)] * weights).sum(dim=1)
        numbers = weights.sum(dim=1)
        return torch.where(numbers > 0, sums / numbers.clamp(min=1), torch.full_like(sums, without))
