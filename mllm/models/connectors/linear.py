"""One matrix: the connector of the first LLaVA (arXiv 2304.08485)."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mllm.models.connectors.base import Connector, ConnectorOptions


@dataclass(frozen=True)
class LinearOptions(ConnectorOptions):
    """Options of `LinearConnector`.

    Args:
        bias: Whether the layer has one.
    """

    bias: bool = True


class LinearConnector(Connector):
    """A linear layer from the encoder's width to the language model's."""

    Options = LinearOptions

    def __init__(self, options: LinearOptions, **sizes: Any):
        super().__init__(options, **sizes)
        self.linear = nn.Linear(self.in_size, self.out_size, bias=options.bias)

    def connect(self, features, lengths, question):
        """Project every feature."""
        return self.linear(features)
