"""What an encoder tells of the patches behind the vectors of a media item: who attends to whom, and their keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mllm.errors import OptionError
from mllm.pruning.scoring import QueriesKeys
from mllm.shapes import Float, Int, Tensor

QUERIES_AT_ONCE = 512
"""Whose attention is in memory together: a picture may have many thousand patches."""


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
        overview: Which of the views shows the whole item, where the others are its tiles; None where none does.
        tiles: Rows and columns of those tiles, which come line by line.
    """

    layers: Mapping[int, QueriesKeys]
    num_prefix_tokens: int
    patches: Int[Tensor, "V p"]
    features: Float[Tensor, "patches D_encoder"] | None = None
    connect: Callable[[Tensor], Tensor] | None = None
    overview: int | None = None
    tiles: tuple[int, int] | None = None

    @property
    def num_views(self) -> int:
        """How many views the item was encoded in."""
        return len(next(iter(self.layers.values())).keys)

    @property
    def views(self) -> Int[Tensor, " V"]:
        """Which view each vector is of; -1 where it stands for no patch."""
        return self.patches.amax(dim=1) // self.num_patches

    def room_of_views(self) -> list[int]:
        """How many of the vectors are of each view."""
        return torch.bincount(self.views[self.is_patch], minlength=self.num_views).tolist()

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
                do="choose a pruner that needs none (visiondrop, visionzip, divprune, random, uniform)",
            )
        queries, keys, scaling = self.layers[layer]
        scores = (queries[:, :, :1] @ keys.transpose(2, 3)).float() * scaling
        return scores.softmax(dim=-1)[:, :, 0, self.num_prefix_tokens :].sum(dim=1).flatten()

    def received_attention(self, layer: int = -1) -> Float[Tensor, " patches"]:
        """What each patch is paid by the patches of its view, as a mean over heads and patches."""
        queries, keys, scaling = self.layers[layer]
        paid = 0.0
        for some in queries[:, :, self.num_prefix_tokens :].split(QUERIES_AT_ONCE, dim=2):
            scores = (some @ keys.transpose(2, 3)).float() * scaling
            paid = paid + scores.softmax(dim=-1)[..., self.num_prefix_tokens :].sum(dim=(1, 2))
        return (paid / (queries.shape[1] * self.num_patches)).flatten()

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


def told(evidence: Evidence | None, *, by: str, unread: str | None = None) -> Evidence:
    """What is told of an item, for a method that cannot do without.

    Args:
        evidence: Of the item.
        by: The method.
        unread: Why nothing can be told of it, as far as that is known.

    Raises:
        OptionError: Nothing is told.
    """
    if evidence is None:
        reason = unread or "its encoder did not run, or not where it could be watched"
        raise OptionError(
            f"{by}, for a model that tells nothing of the patches behind its vectors: {reason}",
            expected="an encoder that runs, and a connector that mixes no patches or only neighbours",
            do="choose a pruner that looks at the vectors alone: divprune, tome, uniform, random",
        )
    return evidence
