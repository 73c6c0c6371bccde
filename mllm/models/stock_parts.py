"""The stock models whose parts we know, one entry each: where encoder, connector and language model stand."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from mllm.errors import OptionError
from mllm.models.encoders import ENCODERS


@dataclass(frozen=True)
class StockParts:
    """Where the parts of one stock class stand.

    Args:
        roots: Full names of modules (or of parameters that stand alone) by part.
        unused: From the config, name prefixes of parameters that never get a gradient.
    """

    roots: dict[str, tuple[str, ...]]
    unused: Callable[[PreTrainedConfig], tuple[str, ...]] = lambda config: ()


def stock_parts(config: PreTrainedConfig) -> StockParts:
    """Look a stock class up by its model type.

    Raises:
        OptionError: It is not in the table.
    """
    if config.model_type not in STOCK_PARTS:
        raise OptionError(
            f"a model of type {config.model_type!r}, whose parts are not known",
            expected=f"a composed model, or one of these types: {', '.join(STOCK_PARTS)}",
            do="name another checkpoint, or add its parts to the table in mllm/models/stock_parts.py",
        )
    return STOCK_PARTS[config.model_type]


def _unused_by_llava(config: PreTrainedConfig) -> tuple[str, ...]:
    """Layers above the feature layer, and what comes after them."""
    root, vision = "model.vision_tower", config.vision_config
    if vision.model_type not in ENCODERS:
        return ()
    num_layers = vision.num_hidden_layers
    wanted = config.vision_feature_layer
    indices = [index if index >= 0 else num_layers + 1 + index for index in _as_list(wanted)]
    above = range(max(indices), num_layers)
    prefixes = ENCODERS[vision.model_type].unused + ("head.",)
    return tuple(f"{root}.{prefix}" for prefix in prefixes) + tuple(
        f"{root}.encoder.layers.{index}." for index in above
    )


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]


_LLAVA = StockParts(
    {
        "image.encoder": ("model.vision_tower",),
        "image.connector": ("model.multi_modal_projector",),
        "text": ("model.language_model", "lm_head"),
    },
    _unused_by_llava,
)
# The vector at the end of each row of features stands beside the projector, in the model itself.
_LLAVA_WITH_NEWLINE = StockParts(
    {**_LLAVA.roots, "image.connector": ("model.multi_modal_projector", "model.image_newline")}, _unused_by_llava
)
_QWEN_VL = StockParts(
    {
        "image.encoder": ("model.visual",),
        "image.connector": ("model.visual.merger",),
        "text": ("model.language_model", "lm_head"),
    }
)
_IDEFICS3 = StockParts(
    {
        "image.encoder": ("model.vision_model",),
        "image.connector": ("model.connector",),
        "text": ("model.text_model", "lm_head"),
    }
)

STOCK_PARTS: dict[str, StockParts] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA_WITH_NEWLINE,
    "llava_onevision": _LLAVA_WITH_NEWLINE,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": StockParts(
        {**_QWEN_VL.roots, "image.connector": ("model.visual.merger", "model.visual.deepstack_merger_list")}
    ),
    # The mask token is there for pre-training, and never put in.
    "internvl": StockParts(_LLAVA.roots, lambda config: ("model.vision_tower.embeddings.mask_token",)),
    "smolvlm": _IDEFICS3,
    "idefics3": _IDEFICS3,
    # SigLIP's pooling head, where a checkpoint carries it along.
    "gemma3": StockParts(_LLAVA.roots, lambda config: ("model.vision_tower.head.",)),
    "qwen2_audio": StockParts(
        {
            "audio.encoder": ("model.audio_tower",),
            "audio.connector": ("model.multi_modal_projector",),
            "text": ("model.language_model", "lm_head"),
        },
        # Whisper's sinusoids, which transformers never trains.
        lambda config: ("model.audio_tower.embed_positions",),
    ),
}
