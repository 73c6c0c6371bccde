"""Supervised fine-tuning: the model's own loss on the assistant's words."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mllm.models.parts import PartOptions
from mllm.training.cross_tokens import CrossTokenTuning
from mllm.training.options import SftArguments
from mllm.training.pruned_steps import check_trainable
from mllm.training.source_losses import num_supervised
from mllm.training.trainer import MllmTrainer


class SftTrainer(MllmTrainer):
    """Mean cross-entropy over all supervised tokens of the global batch.

    The model computes it in its forward (`mllm.models.loss.supervised_loss`), divided by the count that `Trainer`
    gathers over accumulation steps and ranks. With cross tokens their alignment is added, of each micro-batch as much
    as its share of these tokens. With a pruner each step sees fewer visual tokens; validation sees all.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, args: SftArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self.cross_tokens = None if args.cross_tokens is None else CrossTokenTuning(model, args.cross_tokens)
        if args.pruner is not None:
            text = self.parts.get("text", PartOptions())
            check_trainable(model, args.pruner, is_checkpointed=args.gradient_checkpointing or text.checkpointing)

    def train_from(self, checkpoint: Path | None) -> None:
        """See `MllmTrainer.train_from`; cross tokens, too, are as they were."""
        if checkpoint is not None and self.cross_tokens is not None:
            self.cross_tokens.read(checkpoint)
        super().train_from(checkpoint)

    def loss_of(self, model: torch.nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | None) -> Any:
        """The model's loss."""
        with self._pruned():
            outputs = model(**_without_sources(inputs), num_items_in_batch=num_items, use_cache=False)
        self.source_losses.add(inputs["sources"], outputs.token_losses)
        if self.cross_tokens is None:
            return outputs.loss, outputs
        share = num_supervised(inputs["labels"]) / (1 if num_items is None else num_items)
        return outputs.loss + share * self.cross_tokens.loss(inputs), outputs

    def losses_of(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The source and the loss of each supervised token."""
        return inputs["sources"], model(**_without_sources(inputs), use_cache=False).token_losses

    def _pruned(self) -> AbstractContextManager:
        """Around a forward of the step in work."""
        pruner = self.args.pruner
        if pruner is None:
            return nullcontext()
        return pruner.around(self.model, step=self.state.global_step, seed=self.args.seed)


def _without_sources(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "sources"}
