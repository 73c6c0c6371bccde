"""One matrix: the connector of the first LLaVA (arXiv 2304.08485)."""

from torch import nn

from mllm.models.configuration import MllmTowerConfig
from mllm.shapes import Float, Tensor


class LinearConnector(nn.Module):
    """A linear layer from the encoder's width to the language model's."""

    def __init__(self, config: MllmTowerConfig):
        super().__init__()
        self.linear = nn.Linear(config.encoder_config.hidden_size, config.text_hidden_size, bias=config.connector_bias)

    def forward(self, features: Float[Tensor, "N V D_encoder"]) -> Float[Tensor, "N V D_text"]:
        """Project every feature vector."""
        return self.linear(features)
