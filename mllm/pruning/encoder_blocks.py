"""The blocks of vision and text encoders, taken apart in two: tokens can leave between attention and MLP."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mllm.errors import OptionError
from mllm.shapes import Float, Tensor


@dataclass(frozen=True)
class Block:
    """The sub-modules of a block that normalises before attention and before its MLP, by name.

    Args:
        attention_norm: Called first.
        attention: Called second; its linear layers `q_proj` and `k_proj` make queries and keys of all heads.
        mlp_norm: Called on the sum of the block's input and what attention gave.
        mlp: Called on that.
        after_attention: What the output of attention passes before it is added, such as a layer scale.
        after_mlp: The same of the MLP.
    """

    attention_norm: str
    attention: str
    mlp_norm: str
    mlp: str = "mlp"
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()


_CLIP = Block("layer_norm1", "self_attn", "layer_norm2")
_DINO = Block(
    "norm1",
    "attention",
    "norm2",
    after_attention=("layer_scale1", "drop_path"),
    after_mlp=("layer_scale2", "drop_path"),
)

BLOCKS: dict[str, Block] = {
    "clip_vision_model": _CLIP,
    "clip_text_model": _CLIP,
    "siglip_vision_model": _CLIP,
    "dinov2": _DINO,
    "dinov2_with_registers": _DINO,
    "vit": Block(
        "layernorm_before", "attention", "layernorm_after", after_attention=("dropout",), after_mlp=("dropout",)
    ),
}
"""By the model type of the encoder; read in the forward of each block in transformers 5.18 and 5.23."""

UNSUPPORTED_ENCODERS = {
    "dinov3_vit": "its attention rotates by the places of patches, of which merged ones have none",
    "blip_2_vision_model": "its attention takes no mask, by which merged tokens count for several",
    "instructblip_vision_model": "its attention takes no mask, by which merged tokens count for several",
}
"""Encoders whose tokens cannot be merged on their way, and why."""


def block_of(model_type: str) -> Block:
    """Look the blocks of an encoder up.

    Raises:
        OptionError: They are not in the table.
    """
    if model_type in BLOCKS:
        return BLOCKS[model_type]
    reason = UNSUPPORTED_ENCODERS.get(model_type, "where its tokens could leave is not known")
    raise OptionError(
        f"an encoder of type {model_type!r}, for a pruner that works inside of encoders: {reason}",
        expected=f"one of these types: {', '.join(BLOCKS)}",
        do="choose another pruner (visiondrop, divprune, tome, uniform), or run the model without one",
    )


def attended(
    layer: nn.Module, block: Block, hidden: Float[Tensor, "B T D"], mask: Tensor | None, kwargs: dict[str, Any]
) -> Float[Tensor, "B T D"]:
    """The first half of a block: its input and what attention adds."""
    normed = layer.get_submodule(block.attention_norm)(hidden)
    added = layer.get_submodule(block.attention)(normed, attention_mask=mask, **kwargs)[0]
    for name in block.after_attention:
        added = layer.get_submodule(name)(added)
    return hidden + added


def fed_forward(layer: nn.Module, block: Block, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """The second half: what the MLP adds."""
    added = layer.get_submodule(block.mlp)(layer.get_submodule(block.mlp_norm)(hidden))
    for name in block.after_mlp:
        added = layer.get_submodule(name)(added)
    return hidden + added
