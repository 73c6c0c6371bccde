"""Supervised fine-tuning: the model's own loss on the assistant's words."""

from typing import Any

import torch

from mllm.training.trainer import MllmTrainer


class SftTrainer(MllmTrainer):
    """Mean cross-entropy over all supervised tokens of the global batch.

    The model computes it in its forward (`mllm.models.loss.supervised_loss`), divided by the count that `Trainer`
    gathers over accumulation steps and ranks.
    """

    def loss_of(self, model: torch.nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | None) -> Any:
        """The model's loss."""
        outputs = model(**_without_sources(inputs), num_items_in_batch=num_items, use_cache=False)
        self.source_losses.add(inputs["sources"], outputs.token_losses)
        return outputs.loss, outputs

    def losses_of(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The source and the loss of each supervised token."""
        return inputs["sources"], model(**_without_sources(inputs), use_cache=False).token_losses


def _without_sources(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "sources"}
