"""Several image encoders that see the same pixels, as one (SPHINX, arXiv 2311.07575)."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mllm.models.encoders import ENCODERS, build_encoder
from mllm.models.grids import Grid, grid_of_tokens, join_channels
from mllm.models.mixed_configuration import MixedEncoderConfig
from mllm.models.query_encoder import QueryEncoder
from mllm.models.streams import join_streams
from mllm.shapes import Float, Pixels, Tensor


class Seen(NamedTuple):
    """What one encoder makes of a batch.

    Args:
        summary: The class token, or the mean of the grid where there is none; None for what is no grid.
        grid: Patches as a map; None for what is no grid.
        tokens: What is no grid.
    """

    summary: Float[Tensor, "views D"] | None = None
    grid: Grid | None = None
    tokens: Float[Tensor, "views L D"] | None = None


class MixedEncoder(PreTrainedModel):
    """Encoders side by side; their features are joined by channels, or follow one another in streams.

    Its output is one tensor of all streams, see `join_streams`.
    """

    config: MixedEncoderConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MixedEncoderConfig):
        super().__init__(config)
        for name, one in config.encoder_configs.items():
            self.add_module(name, build_encoder(one))
        self.post_init()

    @property
    def encoders(self) -> dict[str, PreTrainedModel]:
        """The encoders by name; a view, never a stored container."""
        return {name: self.get_submodule(name) for name in self.config.encoder_configs}

    def get_input_embeddings(self) -> nn.Module:
        """The first encoder's, for code that asks for gradients of inputs."""
        return self.first.get_input_embeddings()

    def forward(
        self, pixel_values: Pixels, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """Encode images.

        Args:
            pixel_values: As the first encoder's preprocessing normalises them.
            output_hidden_states: Accepted because all encoders are asked for it: the output has one, the features.
            **kwargs: Ignored, as by stock encoders.
        """
        seen = [
            self._read(encoder, own_pixels(pixel_values, reading))
            for encoder, reading in zip(self.encoders.values(), self.config.readings, strict=True)
        ]
        features = join_streams(
            [_stream([seen[number] for number in one["encoders"]], one) for one in self.config.streams]
        )
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))

    def _read(self, encoder: PreTrainedModel, pixels: Pixels) -> Seen:
        pixels = pixels.to(encoder.dtype)
        if isinstance(encoder, QueryEncoder):
            return Seen(tokens=encoder(pixels).last_hidden_state)
        family = ENCODERS[encoder.config.model_type]
        if family.features == "map":
            # Not through its forward, which ends with a norm of the last stage's width, whichever stage comes last.
            grid = encoder.encoder(encoder.embeddings(pixels)).last_hidden_state
            return Seen(summary=grid.mean((2, 3)), grid=grid)
        tokens = encoder(pixels, output_hidden_states=True).hidden_states[-1]
        num_prefix_tokens = family.num_prefix_tokens(encoder.config)
        grid = grid_of_tokens(tokens, num_prefix_tokens)
        return Seen(summary=tokens[:, 0] if num_prefix_tokens else grid.mean((2, 3)), grid=grid)


def own_pixels(pixels: Pixels, reading: dict[str, Any]) -> Float[Tensor, "N C _ _"]:
    """What one encoder sees of an image: the square in its own size and in its own colours.

    Args:
        pixels: As the first encoder's preprocessing normalises them.
        reading: See `MixedEncoderConfig`.
    """
    side = reading["image_size"]
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    if pixels.shape[-1] != side:
        pixels = functional.interpolate(pixels, (side, side), mode="bicubic", align_corners=False, antialias=True)
    scale, shift = (pixels.new_tensor(reading[name]).view(1, -1, 1, 1) for name in ("scale", "shift"))
    return pixels * scale + shift


def _stream(seen: list[Seen], stream: dict[str, Any]) -> Float[Tensor, "views L D"]:
    """The features of one stream, of the encoders that are joined in it."""
    if stream["side"] is None:
        return torch.cat([one.tokens for one in seen if one.tokens is not None], dim=-1)
    cells = join_channels([one.grid for one in seen if one.grid is not None], stream["side"])
    if not stream["has_class_token"]:
        return cells
    summary = torch.cat([one.summary for one in seen if one.summary is not None], dim=-1)
    return torch.cat([summary[:, None], cells], dim=1)
