"""Multi-stream Q-Former: each stream of features has its own queries; all attend to one another (arXiv 2312.05278).

An encoder with several streams gives a global and a local one, such as patches and what a detector looked at. With an
encoder of one stream and tiles, the overview is the global stream and the tiles are the local one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Blip2PreTrainedModel, Blip2QFormerConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.blip_2.modeling_blip_2 import (
    Blip2QFormerAttention,
    Blip2QFormerIntermediate,
    Blip2QFormerOutput,
)

from mllm.errors import OptionError
from mllm.models.connectors.base import Connector, counted_features
from mllm.models.connectors.qformer import FEATURE_NORM_EPSILON, QFormerOptions, fresh_queries, without_flash
from mllm.shapes import Float, Int, MediaVectors, Tensor
from mllm.sizes import ImageTokenRule, LengthRule
from mllm.sizes.tiles import Grid


@dataclass(frozen=True)
class MultiStreamQFormerOptions(QFormerOptions):
    """Options of `MultiStreamQFormerConnector`; the others are those of `QFormerOptions`.

    Args:
        num_queries: Vectors that the global stream becomes, the encoder's first.
        num_local_queries: Vectors that each further stream becomes.
        num_streams: How many streams there are, the global one included.
    """

    num_local_queries: int = 32
    num_streams: int = 2

    def __post_init__(self):
        super().__post_init__()
        self.check("num_local_queries", self.num_local_queries >= 1, "1 or more")
        self.check("num_streams", self.num_streams >= 2, "2 or more; `qformer` reads one")

    @property
    def queries(self) -> tuple[int, ...]:
        """Of each stream."""
        return (self.num_queries, *[self.num_local_queries] * (self.num_streams - 1))

    def length_rule(self) -> LengthRule:
        """As many as there are queries, also where a local stream is empty."""
        return LengthRule("fixed", tokens=sum(self.queries))


class MultiStreamQFormerConnector(Connector):
    """Lets the queries of each stream read it, and projects what they have read.

    An item may have nothing in a local stream. Its local queries then read the global ones alone, and the global ones
    do not know of them: they give what a Q-Former of the global stream gives.
    """

    Options = MultiStreamQFormerOptions

    def __init__(self, options: MultiStreamQFormerOptions, **sizes: Any):
        super().__init__(options, **sizes)
        widths = self.in_sizes * options.num_streams if len(self.in_sizes) == 1 else self.in_sizes
        self._check(options)
        self.feature_norm = nn.ModuleList(
            nn.LayerNorm(width, FEATURE_NORM_EPSILON) if options.feature_norm else nn.Identity() for width in widths
        )
        self.query_tokens = fresh_queries(sum(options.queries), options.hidden_size)
        config = Blip2QFormerConfig(**options.layer_sizes(widths[0]))
        self.qformer = MultiStreamQFormer(config, widths=widths, num_queries=options.queries)
        self.language_projection = nn.Linear(options.hidden_size, self.out_size)

    def connect(self, features, lengths, question):
        """Let the queries read the features that count."""
        streams = features if isinstance(features, tuple) else (features,)
        counts = lengths if isinstance(lengths, tuple) else (lengths,) * len(streams)
        missing = self.options.num_streams - len(streams)
        streams += (streams[0][:, :0],) * missing
        counts += (None,) * missing
        masks = [counted_features(one, count).expand(len(one), -1) for one, count in zip(streams, counts, strict=True)]
        normed = [norm(stream) for norm, stream in zip(self.feature_norm, streams, strict=True)]
        read = self.qformer(self.query_tokens.expand(len(streams[0]), -1, -1), normed, masks)
        return self.language_projection(read)

    def _connect_items(self, features, layout, question):
        """Of an encoder with one stream, one view of an item is global, and all others are local."""
        if isinstance(features, tuple):
            return super()._connect_items(features, layout, question)
        views, first, rest = iter(features), [], []
        for item, size in zip(layout.views, layout.sizes, strict=True):
            overview, others = self._parted([next(views)[:length] for length in item], size)
            first.append(overview)
            rest.append(torch.cat([overview[:0], *others]))
        streams = [_padded(first), _padded(rest)]
        connected = self.connect(
            tuple(stream for stream, _ in streams), tuple(lengths for _, lengths in streams), question
        )
        return self._arranged([[one] for one in connected], layout)

    def _parted(self, views: list[MediaVectors], size: Grid) -> tuple[MediaVectors, Sequence[MediaVectors]]:
        """The view of the whole and those of its parts: the overview of an image in tiles, else the first of all."""
        if self.arrangement is None:
            return views[0], views[1:]
        rule = self.arrangement.rule
        assert isinstance(rule, ImageTokenRule) and rule.tiles is not None
        overview, tiles = rule.tiles.parted(views, rule.tiles.grid(size, rule.image_size))
        ordered = [*overview, *tiles]
        return ordered[0], ordered[1:]

    def _check(self, options: MultiStreamQFormerOptions) -> None:
        if len(self.in_sizes) > 1:
            is_fine = len(self.in_sizes) == options.num_streams
            expected, do = f"num_streams: {len(self.in_sizes)}", "set it"
        else:
            is_fine = options.per == "item" and options.num_streams == 2
            expected = "`per: item` and two streams: of an encoder with one, the first view of an item is the global "
            expected += "stream, and its other views (tiles, frames, windows) are the local one"
            do = "set them, or give the encoder several streams"
        if not is_fine:
            raise OptionError(
                f"a `multi_stream_qformer` with num_streams = {options.num_streams} and per = {options.per!r}, for an "
                f"encoder of {len(self.in_sizes)}",
                expected=expected,
                do=do,
            )


class MultiStreamQFormer(Blip2PreTrainedModel):
    """The layers.

    Args:
        config: Of BLIP-2's.
        widths: Of each stream's features.
        num_queries: Of each stream.
    """

    config: Blip2QFormerConfig

    def __init__(self, config: Blip2QFormerConfig, *, widths: Sequence[int], num_queries: Sequence[int]):
        super().__init__(config)
        self.num_queries = list(num_queries)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer = nn.ModuleList(
            MultiStreamLayer(config, widths, self.num_queries, number) for number in range(config.num_hidden_layers)
        )
        self.post_init()

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """See `QFormer`."""
        return super().get_correct_attn_implementation(without_flash(requested_attention), *args, **kwargs)

    def forward(
        self,
        queries: Float[Tensor, "N Q D"],
        streams: Sequence[Float[Tensor, "N _ _"]],
        masks: Sequence[Tensor],
    ) -> Float[Tensor, "N Q D"]:
        """What the queries know after they have read the streams.

        Args:
            queries: Of all streams, one behind another.
            streams: Features of each.
            masks: Which of them count.
        """
        hidden = self.dropout(self.layernorm(queries))
        has_any = [mask.any(1) for mask in masks]
        has_any[0] = torch.ones_like(has_any[0])
        seen = torch.cat(
            [has[:, None].expand(-1, count) for has, count in zip(has_any, self.num_queries, strict=True)], 1
        )
        # A mask that leaves nothing gives no numbers; an empty stream is read as one zero, and what was read left out.
        streams = [
            stream if stream.shape[1] else stream.new_zeros(len(stream), 1, stream.shape[2]) for stream in streams
        ]
        masks = [mask if mask.shape[1] else mask.new_zeros(len(mask), 1) for mask in masks]
        readable = [mask | ~has[:, None] for mask, has in zip(masks, has_any, strict=True)]
        cross_masks = [
            create_bidirectional_mask(self.config, part, mask.long(), encoder_hidden_states=stream)
            for part, mask, stream in zip(hidden.split(self.num_queries, 1), readable, streams, strict=True)
        ]
        query_mask = create_bidirectional_mask(self.config, hidden, seen.long())
        for layer in self.layer:
            hidden = layer(hidden, query_mask, streams, cross_masks, has_any)
        return hidden


class MultiStreamLayer(GradientCheckpointingLayer):
    """Self-attention of all queries, then of each stream its own cross-attention and feed-forward layers."""

    def __init__(self, config: Blip2QFormerConfig, widths: Sequence[int], num_queries: list[int], number: int):
        super().__init__()
        self.num_queries = num_queries
        self.attention = Blip2QFormerAttention(config)
        self.crossattention = nn.ModuleList()
        if number % config.cross_attention_frequency == 0:
            self.crossattention.extend(_cross_attention(config, width) for width in widths)
        self.intermediate_query = nn.ModuleList(Blip2QFormerIntermediate(config) for _ in widths)
        self.output_query = nn.ModuleList(Blip2QFormerOutput(config) for _ in widths)

    def forward(
        self,
        hidden: Float[Tensor, "N Q D"],
        query_mask: Tensor | None,
        streams: list[Tensor],
        cross_masks: list[Tensor | None],
        has_any: list[Tensor],
    ) -> Float[Tensor, "N Q D"]:
        """See `MultiStreamQFormer.forward`."""
        parts = list(self.attention(hidden, attention_mask=query_mask).split(self.num_queries, 1))
        for number, cross in enumerate(self.crossattention):
            read = cross(
                parts[number], encoder_hidden_states=streams[number], encoder_attention_mask=cross_masks[number]
            )
            parts[number] = torch.where(has_any[number][:, None, None], read, parts[number])
        inner = zip(self.intermediate_query, self.output_query, parts, strict=True)
        return torch.cat([output(intermediate(part), part) for intermediate, output, part in inner], 1)


def _cross_attention(config: Blip2QFormerConfig, width: int) -> Blip2QFormerAttention:
    """One that reads features of this width."""
    cross = Blip2QFormerAttention(config, is_cross_attention=True)
    cross.attention.key = nn.Linear(width, config.hidden_size)
    cross.attention.value = nn.Linear(width, config.hidden_size)
    return cross


def _padded(sequences: list[Float[Tensor, "_ D"]]) -> tuple[Float[Tensor, "N L D"], Int[Tensor, " N"]]:
    lengths = torch.tensor([len(one) for one in sequences], device=sequences[0].device)
    return nn.utils.rnn.pad_sequence(sequences, batch_first=True), lengths
