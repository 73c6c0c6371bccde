"""Q-Former: learned queries read the features, however many, through a few layers of BERT (BLIP-2, arXiv 2301.12597).

The layers are transformers' own, under the names that they have in BLIP-2. With `layers: 2`, `per: item` and
`cross_attention_frequency: 1` it is the video and audio Q-Former of Video-LLaMA (arXiv 2306.02858).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mllm.models.connectors.base import Connector, ConnectorOptions, Question, counted_features
from mllm.shapes import Float, Int, Tensor
from mllm.sizes import LengthRule

STD = 0.02
"""Of fresh weights and queries, as in BERT."""
COUNTS = ("num_queries", "layers", "hidden_size", "heads", "intermediate_size", "cross_attention_frequency")
FEATURE_NORM_EPSILON = 1e-6
"""Of the norm that ends the image encoder of BLIP-2."""


@dataclass(frozen=True)
class QFormerOptions(ConnectorOptions):
    """Options of `QFormerConnector`. The defaults are those of BLIP-2.

    Args:
        num_queries: Vectors that come out, whatever goes in.
        layers: How many.
        hidden_size: Width of queries and layers.
        heads: Of every attention.
        intermediate_size: Width inside the feed-forward layers.
        cross_attention_frequency: Every how many layers the queries read the features; the first layer does.
        dropout: Of attention and layers, while training.
        feature_norm: Whether a LayerNorm of its own stands before the features are read. BLIP-2 trains one, the last
            of its image encoder, which our features do not pass.
        init_from: Directory or Hub id of a BLIP-2, InstructBLIP or BERT checkpoint whose weights it starts with, as
            far as they fit. Read when a model is assembled.
    """

    num_queries: int = 32
    layers: int = 12
    hidden_size: int = 768
    heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    dropout: float = 0.1
    feature_norm: bool = False
    init_from: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in COUNTS:
            self.check(name, getattr(self, name) >= 1, "1 or more")
        self.check("heads", self.hidden_size % self.heads == 0, f"a divisor of hidden_size = {self.hidden_size}")
        self.check("dropout", isinstance(self.dropout, int | float) and 0 <= self.dropout < 1, "0 or more, below 1")

    def length_rule(self) -> LengthRule:
        """As many as there are queries."""
        return LengthRule("fixed", tokens=self.num_queries)

    def layer_sizes(self, in_size: int) -> dict[str, Any]:
        """The fields of transformers' configurations of a Q-Former that reads features of this width."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate_size,
            "cross_attention_frequency": self.cross_attention_frequency,
            "encoder_hidden_size": in_size,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
            "initializer_range": STD,
        }


class QFormer(Blip2QFormerModel):
    """BLIP-2's, beside language models that run under FlashAttention too."""

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """What it uses where its model is told to use something: FlashAttention does not take its masks."""
        return super().get_correct_attn_implementation(without_flash(requested_attention), *args, **kwargs)


class QFormerConnector(Connector):
    """Lets the queries read the features, and projects what they have read."""

    Options = QFormerOptions

    def __init__(self, options: QFormerOptions, **sizes: Any):
        super().__init__(options, **sizes)
        self.feature_norm = nn.LayerNorm(self.in_size, FEATURE_NORM_EPSILON) if options.feature_norm else None
        self.query_tokens = fresh_queries(options.num_queries, options.hidden_size)
        self.qformer = self.build_qformer()
        self.language_projection = nn.Linear(options.hidden_size, self.out_size)

    def build_qformer(self) -> nn.Module:
        """The layers."""
        return QFormer(Blip2QFormerConfig(**self.options.layer_sizes(self.in_size)))

    def normed(self, features: Float[Tensor, "N L D_in"]) -> Float[Tensor, "N L D_in"]:
        """The features as the queries read them."""
        return features if self.feature_norm is None else self.feature_norm(features)

    def read(
        self, features: Float[Tensor, "N L D_in"], mask: Int[Tensor, "N L"] | None, question: Question | None
    ) -> Float[Tensor, "N Q D_hidden"]:
        """What the queries know after they have read normed features, those that the mask says."""
        outputs = self.qformer(
            query_embeds=self.query_tokens.expand(len(features), -1, -1),
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
        )
        return outputs.last_hidden_state

    def connect(self, features, lengths, question):
        """Let the queries read the features that count."""
        if not len(features):
            return features.new_zeros(0, self.options.num_queries, self.out_size)
        mask = None if lengths is None else counted_features(features, lengths).long()
        return self.language_projection(self.read(self.normed(features), mask, question))


def fresh_queries(count: int, width: int) -> nn.Parameter:
    """Queries to be learned."""
    queries = nn.Parameter(torch.empty(1, count, width))
    nn.init.normal_(queries, std=STD)
    return queries


def without_flash(attention: str | None) -> str | None:
    """An attention, or SDPA in place of a flash one."""
    return "sdpa" if attention is not None and "flash" in attention else attention
