"""Supervised fine-tuning: the model's own loss on the assistant's words."""

from mllm.training.trainer import MllmTrainer


class SftTrainer(MllmTrainer):
    """Mean cross-entropy over all supervised tokens of the global batch.

    The model computes it in its forward (`mllm.models.loss.supervised_loss`), divided by the count that `Trainer`
    gathers over accumulation steps and ranks.
    """
