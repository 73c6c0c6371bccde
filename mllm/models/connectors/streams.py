"""A linear layer and a norm for each stream of features, one stream behind another (SPHINX, arXiv 2311.07575)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from mllm.models.connectors.base import Connector, ConnectorOptions


@dataclass(frozen=True)
class StreamsOptions(ConnectorOptions):
    """Options of `StreamsConnector`.

    Args:
        bias: Whether the linear layers have one.
    """

    bias: bool = True


class StreamsConnector(Connector):
    """Leads every stream to the language model's width by itself; of an item they follow one another."""

    Options = StreamsOptions

    def __init__(self, options: StreamsOptions, **sizes: Any):
        super().__init__(options, **sizes)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(size, self.out_size, bias=options.bias), nn.LayerNorm(self.out_size))
            for size in self.in_sizes
        )

    def connect(self, features, lengths, question):
        """Project every feature, and put behind each stream's last what follows it."""
        streams = features if isinstance(features, tuple) else (features,)
        projected = [layer(stream) for layer, stream in zip(self.projections, streams, strict=True)]
        if lengths is None or len(projected) == 1:
            return torch.cat(projected, dim=1)
        items = zip(*projected, strict=True)
        counts = torch.stack(lengths, dim=1).tolist()
        whole = [
            torch.cat([stream[:count] for stream, count in zip(item, own, strict=True)])
            for item, own in zip(items, counts, strict=True)
        ]
        return pad_sequence(whole, batch_first=True)
