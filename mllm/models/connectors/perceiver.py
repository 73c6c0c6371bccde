"""Perceiver resampler: learned latents read the features, however many, in a few layers (Flamingo, Idefics 2).

The resampler is transformers' `Idefics2PerceiverResampler`; with `projection` set to the language model's intermediate
size the whole is Idefics 2's connector (arXiv 2405.02246), weight for weight.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2MLP, Idefics2PerceiverResampler

from mllm.models.connectors.base import Connector, ConnectorOptions, counted_features
from mllm.sizes import LengthRule


@dataclass(frozen=True)
class PerceiverOptions(ConnectorOptions):
    """Options of `PerceiverConnector`.

    Args:
        num_latents: Vectors that come out, whatever goes in.
        depth: Layers, each of attention and a gated MLP.
        heads: Of the attention.
        key_value_heads: Heads of keys and values, shared by those of the queries.
        head_size: Width of a head.
        width: Of latents and layers; 0 for the language model's.
        projection: Width inside the gated MLP that leads the features there; 0 for one linear layer in its place.
    """

    num_latents: int = 64
    depth: int = 3
    heads: int = 16
    key_value_heads: int = 4
    head_size: int = 96
    width: int = 0
    projection: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_latents", "depth", "heads", "key_value_heads", "head_size"):
            self.check(name, getattr(self, name) >= 1, "1 or more")
        for name in ("width", "projection"):
            self.check(name, getattr(self, name) >= 0, "0 or more")
        self.check("heads", self.heads % self.key_value_heads == 0, f"a multiple of {self.key_value_heads}")

    def length_rule(self) -> LengthRule:
        """As many as there are latents."""
        return LengthRule("fixed", tokens=self.num_latents)


class PerceiverConnector(Connector):
    """Projects the features, lets the latents attend to them and to one another, and leads the latents out."""

    Options = PerceiverOptions

    def __init__(self, options: PerceiverOptions, **sizes: Any):
        super().__init__(options, **sizes)
        width = options.width or self.out_size
        config = Idefics2PerceiverConfig(
            hidden_size=width,
            resampler_n_latents=options.num_latents,
            resampler_depth=options.depth,
            resampler_n_heads=options.heads,
            resampler_head_dim=options.head_size,
            num_key_value_heads=options.key_value_heads,
        )
        self.modality_projection: nn.Module = nn.Linear(self.in_size, width)
        if options.projection:
            self.modality_projection = Idefics2MLP(self.in_size, options.projection, width, "silu")
        self.perceiver_resampler = Idefics2PerceiverResampler(config)
        # transformers starts them all at one, which would keep them equal for ever: it means to load trained ones.
        nn.init.normal_(self.perceiver_resampler.latents, std=config.initializer_range)
        self.linear = nn.Linear(width, self.out_size) if options.width else None

    def connect(self, features, lengths, question):
        """Let the latents read the features that count."""
        counted = counted_features(features, lengths).expand(len(features), -1).long()
        latents = self.perceiver_resampler(context=self.modality_projection(features), attention_mask=counted)
        return latents if self.linear is None else self.linear(latents)
