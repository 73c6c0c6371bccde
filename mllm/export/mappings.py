"""What a composition is called in stock transformers classes: one `ExportTarget` for each class, in one table.

Adding a target: write the functions it names and a line in `TARGETS`. transformers calls our encoder `vision_tower`;
that is said here, and nowhere else.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from mllm.assemble import check_text_only_equality
from mllm.errors import CompositionError, ExportError
from mllm.models import MllmConfig, MllmForConditionalGeneration
from mllm.processing import MllmProcessor
from mllm.sizes import num_tokens

KEEP = "keep the mllm checkpoint, which `AutoModelForImageTextToText` loads after `import mllm`"


class Obstacle(NamedTuple):
    """One reason why a composition cannot be expressed in a stock class, and what would make it expressible."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class ExportTarget:
    """A stock class, and how our composition reads in it.

    Args:
        model_class: The stock class.
        renames: Our parameter-name prefixes and the stock class's, the first that fits.
        obstacles: Why a model cannot be expressed; empty where it can.
        build_config: The stock configuration of a model without obstacles.
        build_processor: The stock processor that makes the same ids and pixels.
    """

    model_class: type[PreTrainedModel]
    renames: tuple[tuple[str, str], ...]
    obstacles: Callable[[MllmForConditionalGeneration, MllmProcessor], list[Obstacle]]
    build_config: Callable[[MllmConfig], PreTrainedConfig]
    build_processor: Callable[[MllmProcessor, MllmConfig], ProcessorMixin]

    @property
    def architecture(self) -> str:
        """The name of the stock class."""
        return self.model_class.__name__


def find_target(
    model: MllmForConditionalGeneration, processor: MllmProcessor, *, name: str | None = None
) -> ExportTarget:
    """Choose the target called `name`, or the first in the table that can express the model.

    Raises:
        ExportError: No such target, or none that can express it; the message holds every reason and remedy.
    """
    if name is not None and name not in TARGETS:
        raise ExportError(
            f"export target {name!r}",
            expected=f"one of {', '.join(TARGETS)}",
            do="name one of them, or none to have one chosen",
        )
    found: dict[str, list[Obstacle]] = {}
    for key in TARGETS if name is None else (name,):
        found[key] = TARGETS[key].obstacles(model, processor)
        if not found[key]:
            return TARGETS[key]
    raise ExportError(
        "; ".join(f"not {key}: {obstacle.reason}" for key, reasons in found.items() for obstacle in reasons),
        expected="a composition that a stock transformers class can express",
        do="; or ".join([*(obstacle.remedy for reasons in found.values() for obstacle in reasons), KEEP]),
    )


def rename_parameters(state: dict[str, Tensor], renames: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Give every tensor its stock name; the tensors themselves are shared, not copied.

    Example: `model.image_tower.encoder.x` becomes LLaVA's `model.vision_tower.x`.
    """
    return {_rename(key, renames): tensor for key, tensor in state.items()}


def _rename(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for ours, stock in renames:
        if key.startswith(ours):
            return stock + key[len(ours) :]
    raise ExportError(
        f"a parameter {key}, which the target has no name for",
        expected=f"names that begin with one of {', '.join(ours for ours, _ in renames)}",
        do="report this: the table in mllm/export/mappings.py lacks a line",
    )


# --- LlavaForConditionalGeneration ---------------------------------------------------------------------------------
# https://github.com/huggingface/transformers/blob/main/src/transformers/models/llava/modeling_llava.py
# Encoder of fixed square resolution -> hidden_states[k], first token dropped or not -> linear, activation, linear with
# the text width inside -> decoder -> a head that is one matrix.

LLAVA_ENCODERS = (
    "clip_vision_model",
    "siglip_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "vit",
)


def _llava_obstacles(model: MllmForConditionalGeneration, processor: MllmProcessor) -> list[Obstacle]:
    config = model.config
    obstacles = [
        Obstacle(f"it has a tower for {modality}", "assemble it without that tower")
        for modality in config.tower_configs
        if modality != "image"
    ]
    if config.image_config is None:
        return [
            *obstacles,
            Obstacle("it has no image tower", "export the language model alone with `save_pretrained`"),
        ]
    image = config.image_config
    connector = image.connector
    if connector["type"] != "mlp" or connector["layers"] != 2 or connector["positions"]:
        reason = f"its connector is {connector['type']!r}, not linear-activation-linear"
        obstacles.append(Obstacle(reason, "assemble and train it with `connector: mlp`"))
    if image.media_rule.tiles is not None:
        obstacles.append(Obstacle("it reads images in tiles", "assemble it without `tiles`"))
    if image.encoder_config.model_type not in LLAVA_ENCODERS:
        reason = f"its image encoder is a {image.encoder_config.model_type!r} model"
        obstacles.append(Obstacle(reason, f"use an encoder of type {', '.join(LLAVA_ENCODERS)}"))
    if not type(processor.image_processor).__module__.startswith("transformers."):
        reason = f"its image processor {type(processor.image_processor).__name__} is no class of transformers"
        obstacles.append(Obstacle(reason, "assemble it with another `geometry`"))
    return [*obstacles, *_head_obstacles(model)]


def _llava_config(config: MllmConfig) -> LlavaConfig:
    image = config.image_config
    rule = image.media_rule
    return LlavaConfig(
        vision_config=_without_path(image.encoder_config),
        text_config=_without_path(config.text_config),
        image_token_index=image.placeholder_token_id,
        image_seq_length=num_tokens((rule.image_size, rule.image_size), rule),
        projector_hidden_act=image.connector["activation"],
        vision_feature_select_strategy=rule.feature_select,
        vision_feature_layer=image.feature_layer,
        multimodal_projector_bias=image.connector["bias"],
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _without_path(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that does not tell which directory of this machine the part was loaded from."""
    config = deepcopy(config)
    config.name_or_path = ""
    return config


def _llava_processor(processor: MllmProcessor, config: MllmConfig) -> LlavaProcessor:
    rule = config.image_config.media_rule
    return LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=rule.patch_size,
        vision_feature_select_strategy=rule.feature_select,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=rule.num_prefix_tokens,
    )


def _head_obstacles(model: MllmForConditionalGeneration) -> list[Obstacle]:
    """What the language model's own class does around its head and LLaVA does not.

    Granite and Cohere scale their logits, Gemma 2 caps them, Phi adds a bias. Rather than knowing them by name, our
    very weights are run once through the family's own class: anything but equality bit for bit is an obstacle.
    """
    language_model, remedy = model.model.language_model, "use a language model of another family"
    if model.config.tie_word_embeddings and "embed_tokens.weight" not in language_model.state_dict():
        reason = f"its tied embedding is not called embed_tokens ({model.config.text_config.model_type!r})"
        return [Obstacle(reason, "untie head and embedding before training")]
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(model.config.text_config)
    body = f"{causal.base_model_prefix}."
    outside = [name for name, _ in causal.named_parameters(remove_duplicate=False) if not name.startswith(body)]
    if len(outside) > 1:
        return [Obstacle(f"the head of {type(causal).__name__} has parameters of its own: {outside}", remedy)]
    setattr(causal, causal.base_model_prefix, language_model)
    causal.set_output_embeddings(model.lm_head)
    try:
        check_text_only_equality(model, causal, where="the language model")
    except CompositionError as error:
        return [Obstacle(error.found, remedy)]
    return []


TARGETS: dict[str, ExportTarget] = {
    "llava": ExportTarget(
        model_class=LlavaForConditionalGeneration,
        renames=(
            ("model.image_tower.encoder.", "model.vision_tower."),
            ("model.image_tower.connector.", "model.multi_modal_projector."),
            ("model.language_model.", "model.language_model."),
            ("lm_head.", "lm_head."),
        ),
        obstacles=_llava_obstacles,
        build_config=_llava_config,
        build_processor=_llava_processor,
    ),
}
