"""Linear, activation, linear: the connector of LLaVA-1.5 (arXiv 2310.03744, `mlp2x_gelu`)."""

from torch import nn
from transformers.activations import ACT2FN

from mllm.models.configuration import MllmTowerConfig
from mllm.shapes import Float, Tensor


class MlpConnector(nn.Module):
    """Two linear layers with the language model's width between them.

    That width is what stock LLaVA has; keeping to it makes export a renaming.
    """

    def __init__(self, config: MllmTowerConfig):
        super().__init__()
        width = config.text_hidden_size
        self.linear_1 = nn.Linear(config.encoder_config.hidden_size, width, bias=config.connector_bias)
        self.act = ACT2FN[config.connector_activation]
        self.linear_2 = nn.Linear(width, width, bias=config.connector_bias)

    def forward(self, features: Float[Tensor, "N V D_encoder"]) -> Float[Tensor, "N V D_text"]:
        """Project every feature vector."""
        return self.linear_2(self.act(self.linear_1(features)))
