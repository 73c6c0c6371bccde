"""What Qwen3-VL adds to visual tokens behind its first layers, for those that are left."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mllm.pruning.prefill import Stage, gathered
from mllm.shapes import Bool, Float, Int, Tensor

MARKS, FEATURES = "visual_pos_masks", "deepstack_visual_embeds"
"""The inputs of the language model that say where, and what behind each of its first layers."""


@dataclass(frozen=True)
class DeepFeatures:
    """Of a prompt.

    Args:
        is_visual: Which columns get some.
        features: Behind each of the first layers, for all those columns, row by row.
    """

    is_visual: Bool[Tensor, "B T"]
    features: tuple[Float[Tensor, "visual D"], ...]

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> "DeepFeatures | None":
        """Of the inputs of a language model; None where it has none."""
        if kwargs.get(MARKS) is None or not kwargs.get(FEATURES):
            return None
        return cls(kwargs[MARKS], tuple(kwargs[FEATURES]))

    def inputs(self, stage: Stage) -> dict[str, Any]:
        """The inputs in which only the tokens of a stage are left."""
        is_left = torch.zeros_like(self.is_visual).scatter(1, stage.columns, stage.is_token)[self.is_visual]
        return {MARKS: self._marks(stage), FEATURES: [one[is_left] for one in self.features]}

    def added(self, hidden: Float[Tensor, "B M D"], number: int, stage: Stage) -> Float[Tensor, "B M D"]:
        """Hidden states with what comes in behind a layer, where the language model does not see to it."""
        features = self.features[number].to(hidden.device, hidden.dtype)
        numbers: Int[Tensor, "B T"] = (self.is_visual.flatten().cumsum(0) - 1).view_as(self.is_visual).clamp(min=0)
        return hidden + features[gathered(numbers, stage.columns, -1)] * self._marks(stage)[..., None]

    def _marks(self, stage: Stage) -> Bool[Tensor, "B M"]:
        return gathered(self.is_visual, stage.columns, -1) & stage.is_token
