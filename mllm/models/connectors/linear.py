"""One matrix: the connector of the first LLaVA (arXiv 2304.08485)."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mllm.errors import OptionError
from mllm.models.connectors.base import Connector, ConnectorOptions


@dataclass(frozen=True)
class LinearOptions(ConnectorOptions):
    """Options of `LinearConnector`.

    Args:
        bias: Whether the layer has one.
        starts_as_identity: Whether it gives out what it is given, before it is trained: for features that passed
            another connector before (`through_image_connector` of videos).
    """

    bias: bool = True
    starts_as_identity: bool = False


class LinearConnector(Connector):
    """A linear layer from the encoder's width to the language model's.

    Raises:
        OptionError: It is to start as the identity, between two widths.
    """

    Options = LinearOptions

    def __init__(self, options: LinearOptions, **sizes: Any):
        super().__init__(options, **sizes)
        self.linear = nn.Linear(self.in_size, self.out_size, bias=options.bias)
        if options.starts_as_identity:
            self._start_as_identity()

    def connect(self, features, lengths, question):
        """Project every feature."""
        return self.linear(features)

    def _start_as_identity(self) -> None:
        if self.in_size != self.out_size:
            raise OptionError(
                f"a `linear` connector from width {self.in_size} to {self.out_size} that starts as the identity",
                expected="features as wide as the language model",
                do="leave `starts_as_identity` out",
            )
        nn.init.eye_(self.linear.weight)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)
