"""Features as they are, with a learned token of their modality: OneEncoder (arXiv 2409.11059).

For encoders that have the language model's width already, or whose features were aligned with it before.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mllm.errors import OptionError
from mllm.models.connectors.base import Connector, ConnectorOptions

WIDTHS = (64, 128)
"""Of the layers between the modality's few numbers and a token of full width."""


@dataclass(frozen=True)
class IdentityOptions(ConnectorOptions):
    """Options of `IdentityConnector`.

    Args:
        token_size: How many numbers a modality is told by.
    """

    token_size: int = 3

    def __post_init__(self):
        super().__post_init__()
        self.check("token_size", self.token_size >= 1, "1 or more")


class IdentityConnector(Connector):
    """Adds the modality's token to every feature. A small network makes it of a few learned numbers.

    Raises:
        OptionError: The features have another width than the language model.
    """

    Options = IdentityOptions

    def __init__(self, options: IdentityOptions, **sizes: Any):
        super().__init__(options, **sizes)
        if self.in_size != self.out_size:
            raise OptionError(
                f"an `identity` connector from width {self.in_size} to {self.out_size}",
                expected="an encoder as wide as the language model",
                do="choose `linear`, `mlp` or another connector that leads from one width to the other",
            )
        self.modality = nn.Parameter(torch.empty(options.token_size))
        nn.init.normal_(self.modality)
        layers: list[nn.Module] = []
        width = options.token_size
        for wider in WIDTHS:
            layers += [nn.Linear(width, wider), nn.GELU()]
            width = wider
        self.network = nn.Sequential(*layers, nn.Linear(width, self.out_size), nn.LayerNorm(self.out_size))

    def connect(self, features, lengths, question):
        """Add the token."""
        return features + self.network(self.modality)
