"""The encoders that can be composed, one entry each: what they are in a checkpoint, what precedes their patches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from mllm.errors import CompositionError


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
    """

    model_type: str
    sub_config: str | None = None
    num_prefix_tokens: Callable[[PreTrainedConfig], int] = lambda config: 1
    unexpected_prefixes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    overrides: dict[str, object] = field(default_factory=dict)


def _with_registers(config: PreTrainedConfig) -> int:
    return 1 + config.num_register_tokens


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

ENCODERS: dict[str, EncoderFamily] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": EncoderFamily(
        "dinov2", unexpected_prefixes=("classifier.",), unused=("layernorm", "embeddings.mask_token")
    ),
    "dinov2_with_registers": EncoderFamily(
        "dinov2_with_registers",
        num_prefix_tokens=_with_registers,
        unexpected_prefixes=("classifier.",),
        unused=("layernorm", "embeddings.mask_token"),
    ),
    "dinov3_vit": EncoderFamily(
        "dinov3_vit", num_prefix_tokens=_with_registers, unused=("norm", "embeddings.mask_token")
    ),
    "vit": EncoderFamily("vit", unexpected_prefixes=("classifier.",), unused=("layernorm", "pooler")),
}


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
        do="name another checkpoint as `image_encoder`",
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
    config = _with_layers(config, _layers_needed(config.num_hidden_layers, feature_layer, path))
    with _without_load_report():
        encoder, loaded = AutoModel.from_pretrained(path, config=config, output_loading_info=True)
    _check_keys(loaded, family, config.num_hidden_layers, path)
    return encoder, family.num_prefix_tokens(config)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Transformers would warn of every layer we leave behind on purpose; `_check_keys` judges in its place."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _layers_needed(num_layers: int, feature_layer: int, path: str) -> int:
    """`hidden_states` has num_layers + 1 entries, the first of which is the embeddings."""
    index = feature_layer if feature_layer >= 0 else num_layers + 1 + feature_layer
    if not 1 <= index <= num_layers:
        raise CompositionError(
            f"feature_layer = {feature_layer}, and {path} has {num_layers} layers",
            expected=f"-{num_layers} to -1, or 1 to {num_layers}",
            do="set `feature_layer` to one of them; -2 is LLaVA-1.5's, -1 the last layer",
        )
    return index


def _with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The same configuration with fewer layers; what backbones (DINO) derive from their number is derived anew."""
    derived = ("stage_names", "out_features", "out_indices")
    fields = {name: value for name, value in config.to_dict().items() if name not in derived}
    return type(config).from_dict({**fields, "num_hidden_layers": num_layers})


def _check_keys(loaded: dict, family: EncoderFamily, num_layers: int, path: str) -> None:
    """No missing key; unexpected ones only under the table's prefixes or of layers above the features."""
    missing = sorted(loaded["missing_keys"])
    mismatched = sorted(str(key) for key in loaded["mismatched_keys"])
    left_over = sorted(
        key
        for key in loaded["unexpected_keys"]
        if not key.startswith(family.unexpected_prefixes) and not _is_of_dropped_layer(key, num_layers)
    )
    if missing or mismatched or left_over:
        raise CompositionError(
            f"loading {path} left keys missing {missing[:3]}, left over {left_over[:3]}, "
            f"of other shape {mismatched[:3]}",
            expected=f"the weights of a {family.model_type!r} encoder, no more and no less",
            do="check that the checkpoint is whole and was saved by transformers",
        )


def _is_of_dropped_layer(key: str, num_layers: int) -> bool:
    """Whether `key` names a block (the first number in it) at or above the ones we keep."""
    number = next((int(piece) for piece in key.split(".") if piece.isdigit()), None)
    return number is not None and number >= num_layers
