"""Linear, activation, linear: the connector of LLaVA-1.5 (arXiv 2310.03744, `mlp2x_gelu`)."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from mllm.models.connectors.base import Connector, ConnectorOptions
from mllm.shapes import Float, Tensor


@dataclass(frozen=True)
class MlpOptions(ConnectorOptions):
    """Options of `MlpConnector`.

    Args:
        layers: How many linear layers, with an activation between each two.
        activation: By its transformers name.
        bias: Whether the layers have one.
    """

    layers: int = 2
    activation: str = "gelu"
    bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check("layers", self.layers >= 1, "1 or more")
        self.check("activation", self.activation in ACT2FN, "the transformers name of one, such as gelu, silu or relu")

    @property
    def num_joined(self) -> int:
        """How many features stand side by side in a vector that enters the layers."""
        return 1


class MlpConnector(Connector):
    """Linear layers with the language model's width between them.

    That width, and two of them, is what stock LLaVA has; keeping to it makes export a renaming.
    """

    Options = MlpOptions

    def __init__(self, options: MlpOptions, **sizes: Any):
        super().__init__(options, **sizes)
        self.act = ACT2FN[options.activation]
        for number in range(1, options.layers + 1):
            width = self.in_size * options.num_joined if number == 1 else self.out_size
            self.add_module(f"linear_{number}", nn.Linear(width, self.out_size, bias=options.bias))

    def connect(self, features, lengths, question):
        """Project every feature."""
        return self.project(features)

    def project(self, vectors: Float[Tensor, "N V D_joined"]) -> Float[Tensor, "N V D_out"]:
        """Lead vectors through all layers."""
        for number in range(1, self.options.layers + 1):
            layer = self.get_submodule(f"linear_{number}")
            vectors = layer(vectors if number == 1 else self.act(vectors))
        return vectors
