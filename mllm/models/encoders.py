"""The encoders that can be composed, one entry each: what they are in a checkpoint, what precedes their patches."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    Blip2VisionModel,
    InstructBlipVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from mllm.errors import CompositionError
from mllm.models.audio_families import AUDIO_ENCODERS
from mllm.models.encoder_checkpoints import layers_needed, load_part
from mllm.models.mixed_configuration import MixedEncoderConfig
from mllm.models.query_encoder import QueryEncoderConfig
from mllm.sizes import MediaRule

NUM_CHANNELS = 3
"""Of the pixels: images are RGB wherever they are decoded, and configurations of BLIP-2 do not state it."""


@dataclass(frozen=True)
class EncoderFamily:
    """How one family of encoders is found, loaded and read.

    Args:
        model_type: transformers' name of the encoder alone.
        sub_config: Where the encoder's config stands in a two-tower checkpoint ("vision_config" of CLIP).
        num_prefix_tokens: Tokens in front of the patches, from the config.
        unexpected_prefixes: Keys of a checkpoint that are not the encoder's and may be left behind.
        unused: Prefixes of the encoder's parameters that the features never pass. They get no gradient, so training
            leaves them alone (a distributed run stops at parameters that wait for one).
        overrides: Config fields set at assembly, for parts that would only be carried along.
        kind: Its class, where no auto class knows it.
        key_mapping: Patterns of the names that a checkpoint has, and what they are in the encoder.
        features: "tokens", patches behind what stands in front of them; or "map", the last stage of a convolutional
            encoder, which `MixedEncoder` reads.
        is_resizable: Whether it reads squares of other sides than the one it was trained on.
    """

    model_type: str
    sub_config: str | None = None
    num_prefix_tokens: Callable[[PreTrainedConfig], int] = lambda config: 1
    unexpected_prefixes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    overrides: dict[str, object] = field(default_factory=dict)
    kind: type[PreTrainedModel] | None = None
    key_mapping: dict[str, str] = field(default_factory=dict)
    features: str = "tokens"
    is_resizable: bool = False


def _with_registers(config: PreTrainedConfig) -> int:
    return 1 + config.num_register_tokens


def _convolutional(model_type: str) -> EncoderFamily:
    """ConvNeXt: its layers are stages, each of which halves the grid."""
    return EncoderFamily(
        model_type,
        num_prefix_tokens=lambda config: 0,
        unexpected_prefixes=("classifier.",),
        unused=("layernorm",),
        features="map",
        is_resizable=True,
    )


def _of_blip(model_type: str, kind: type[PreTrainedModel]) -> EncoderFamily:
    """EVA-CLIP's ViT-g as BLIP-2 has it; its last norm is the first of BLIP-2's Q-Former connector."""
    return EncoderFamily(
        model_type,
        sub_config="vision_config",
        unexpected_prefixes=(
            "language_model.", "language_projection.", "qformer.", "query_tokens", "vision_projection.",
            "text_projection.", "itm_head.", "embeddings.",
        ),
        unused=("post_layernorm",),
        kind=kind,
        key_mapping={r"^vision_model\.": ""},
    )  # fmt: skip


_CLIP = EncoderFamily(
    "clip_vision_model",
    sub_config="vision_config",
    unexpected_prefixes=("text_model.", "logit_scale", "text_projection.", "visual_projection."),
    unused=("post_layernorm",),
)
_SIGLIP = EncoderFamily(
    "siglip_vision_model",
    sub_config="vision_config",
    num_prefix_tokens=lambda config: 0,
    unexpected_prefixes=("text_model.", "logit_scale", "logit_bias", "head.", "vision_model.head."),
    unused=("post_layernorm",),
    overrides={"vision_use_head": False},
)

_BLIP_2 = _of_blip("blip_2_vision_model", Blip2VisionModel)
_INSTRUCT_BLIP = _of_blip("instructblip_vision_model", InstructBlipVisionModel)

ENCODERS: dict[str, EncoderFamily] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": EncoderFamily(
        "dinov2",
        unexpected_prefixes=("classifier.",),
        unused=("layernorm", "embeddings.mask_token"),
        is_resizable=True,
    ),
    "dinov2_with_registers": EncoderFamily(
        "dinov2_with_registers",
        num_prefix_tokens=_with_registers,
        unexpected_prefixes=("classifier.",),
        unused=("layernorm", "embeddings.mask_token"),
        is_resizable=True,
    ),
    "dinov3_vit": EncoderFamily(
        "dinov3_vit",
        num_prefix_tokens=_with_registers,
        unused=("norm", "embeddings.mask_token"),
        is_resizable=True,
    ),
    "vit": EncoderFamily("vit", unexpected_prefixes=("classifier.",), unused=("layernorm", "pooler")),
    "blip-2": _BLIP_2,
    "blip_2_vision_model": _BLIP_2,
    "instructblip": _INSTRUCT_BLIP,
    "instructblip_vision_model": _INSTRUCT_BLIP,
    "convnext": _convolutional("convnext"),
    "convnextv2": _convolutional("convnextv2"),
}


def side(value: int | list[int] | tuple[int, ...]) -> int:
    """Configs write a square's side as 14 or as [14, 14]."""
    return value if isinstance(value, int) else int(value[0])


def feature_width(config: PreTrainedConfig) -> int:
    """Width of an image encoder's features."""
    if isinstance(config, QueryEncoderConfig) or ENCODERS[config.model_type].features == "tokens":
        return config.hidden_size
    return config.hidden_sizes[config.num_stages - 1]


def grid_side(config: PreTrainedConfig, image_size: int) -> int:
    """How many cells an image encoder makes of the side of a square of so many pixels."""
    if ENCODERS[config.model_type].features == "map":
        return image_size // (side(config.patch_size) * 2 ** (config.num_stages - 1))
    return image_size // side(config.patch_size)


def native_shape(config: PreTrainedConfig, rule: MediaRule) -> tuple[int, ...]:
    """The shape of one view as the encoder takes it."""
    if rule.kind == "audio":
        return AUDIO_ENCODERS[config.model_type].shape(config, rule.window)
    return NUM_CHANNELS, rule.image_size, rule.image_size


def unused_parameters(config: PreTrainedConfig) -> tuple[str, ...]:
    """Prefixes of an encoder's parameters that its features never pass."""
    if config.model_type in AUDIO_ENCODERS:
        return AUDIO_ENCODERS[config.model_type].unused(config)
    if isinstance(config, QueryEncoderConfig):
        return ()
    if isinstance(config, MixedEncoderConfig):
        named = config.encoder_configs.items()
        return tuple(f"{name}.{prefix}" for name, one in named for prefix in unused_parameters(one))
    return ENCODERS[config.model_type].unused


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """An encoder with fresh weights, in the type that is being loaded, which transformers does not hand on so deep."""
    dtype = torch.get_default_dtype()
    if config.model_type in AUDIO_ENCODERS:
        return AUDIO_ENCODERS[config.model_type].kind(config).to(dtype)
    family = ENCODERS.get(config.model_type)
    if family is not None and family.kind is not None:
        return family.kind(config).to(dtype)
    return AutoModel.from_config(config, dtype=dtype)


def encoder_family(model_type: str, *, where: str) -> EncoderFamily:
    """Look an encoder family up by transformers' model type.

    Raises:
        CompositionError: The family is not in the table.
    """
    if model_type in ENCODERS:
        return ENCODERS[model_type]
    reason = ""
    if model_type in ("siglip2", "siglip2_vision_model"):
        reason = " (NaFlex: images of varying patch counts; the fixed-resolution SigLIP 2 checkpoints can be used)"
    raise CompositionError(
        f"{where} is a {model_type!r} model{reason}",
        expected=f"an image encoder of one of these types: {', '.join(ENCODERS)}",
        do="name another checkpoint as `image.encoder`",
    )


def load_encoder(path: str, *, feature_layer: int) -> tuple[PreTrainedModel, int]:
    """Load the encoder out of a checkpoint and keep only the layers its features come from.

    Args:
        path: Directory or Hub id of an encoder or of the two-tower model it is part of.
        feature_layer: Index into `hidden_states` of the checkpoint's encoder; negative counts from the end.

    Returns:
        The encoder, whose `hidden_states[-1]` are now the features, and its number of prefix tokens.

    Raises:
        CompositionError: Not an encoder we know, no such layer, or keys missing or left over.
    """
    config = AutoConfig.from_pretrained(path)
    family = encoder_family(config.model_type, where=path)
    if family.sub_config and hasattr(config, family.sub_config):
        config = getattr(config, family.sub_config)
    for name, value in family.overrides.items():
        setattr(config, name, value)
    config = _with_layers(config, layers_needed(config.num_hidden_layers, feature_layer, path))
    encoder = load_part(
        family.kind or AutoModel,
        path,
        config=config,
        unexpected_prefixes=family.unexpected_prefixes,
        key_mapping=family.key_mapping or None,
    )
    return encoder, family.num_prefix_tokens(config)


def _with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The same configuration with fewer layers; what backbones (DINO) derive from their number is derived anew."""
    derived = ("stage_names", "out_features", "out_indices")
    fields = {name: value for name, value in config.to_dict().items() if name not in derived}
    return type(config).from_dict({**fields, "num_hidden_layers": num_layers})
