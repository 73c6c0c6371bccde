"""Tiny random image encoders as downloads look, each with the colours of its family, for tests and scripts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

_LAYERS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
NUM_QUERIES = 5
"""Of the BLIP-2 whose Q-Former can be an encoder."""


def save_tiny_image_encoder(directory: Path, family: str = "clip_vision_model", *, image_size: int = 16) -> str:
    """Save a tiny encoder with its preprocessing, or the tiny BLIP-2 that holds one, and return its directory.

    Args:
        directory: Where it is made.
        family: A key of `mllm.models.encoders.ENCODERS`.
        image_size: Of its pixels. Patches have 8, and a ConvNeXt's cells 8 after its last stage.
    """
    tiny_image_model(family, image_size=image_size).save_pretrained(directory)
    _preprocessing(family, image_size).save_pretrained(directory)
    return str(directory)


def tiny_image_model(family: str, *, image_size: int = 16) -> PreTrainedModel:
    """A random model that is an encoder of this family, or has one."""
    torch.manual_seed(5)
    build: Callable[[str, int], PreTrainedModel] = _BUILD.get(family, _plain)
    return build(family, image_size).eval()


def save_sphinx_encoders(directory: Path) -> list[Any]:
    """Save tiny encoders as SPHINX mixes them, and return them as `image: encoder`, for `join: sequence`.

    Queries of a BLIP-2 are a stream; CLIP, ConvNeXt at 16 px and DINOv2 are joined by channels.
    """
    paths = {
        name: save_tiny_image_encoder(directory / name, name, image_size=size)
        for name, size in (("blip-2", 16), ("clip_vision_model", 16), ("convnext", 16), ("dinov2", 32))
    }
    convnext = {"encoder": paths["convnext"], "feature_layer": -1}
    return [{"encoder": paths["blip-2"], "queries": True}, [paths["clip_vision_model"], convnext, paths["dinov2"]]]


def _plain(family: str, image_size: int) -> PreTrainedModel:
    registers = {"num_register_tokens": 4} if family in ("dinov2_with_registers", "dinov3_vit") else {}
    config = AutoConfig.for_model(family, **_LAYERS, image_size=image_size, patch_size=8, **registers)
    return AutoModel.from_config(config)


def _convolutional(family: str, image_size: int) -> PreTrainedModel:
    """Three stages: cells of 2, 4 and 8 pixels."""
    sizes = {"hidden_sizes": [8, 12, 20], "depths": [1, 1, 2], "num_stages": 3, "patch_size": 2}
    # At 1e-6, as they begin, blocks would hardly be seen.
    scale = {"layer_scale_init_value": 0.5} if family == "convnext" else {}
    return AutoModel.from_config(AutoConfig.for_model(family, **sizes, **scale, image_size=image_size))


def _of_blip(family: str, image_size: int) -> PreTrainedModel:
    kind = {"blip-2": Blip2ForConditionalGeneration, "instructblip": InstructBlipForConditionalGeneration}[family]
    vision = {**_LAYERS, "image_size": image_size, "patch_size": 8, "initializer_range": 0.02}
    text = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "vocab_size": 20}
    config = AutoConfig.for_model(
        family,
        vision_config=vision,
        qformer_config={**_LAYERS, "vocab_size": 20, "num_hidden_layers": 2},
        text_config={**text, "num_attention_heads": 2, "word_embed_proj_dim": 16},
        num_query_tokens=NUM_QUERIES,
    )
    model = kind(config)
    torch.nn.init.normal_(model.query_tokens)  # at zero, as they begin, all are one
    return model


def _preprocessing(family: str, image_size: int) -> Any:
    square = {"height": image_size, "width": image_size}
    imagenet = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    if family in ("convnext", "convnextv2"):
        return ConvNextImageProcessorPil(size={"shortest_edge": image_size}, **imagenet)
    if family in ("blip-2", "instructblip"):
        return BlipImageProcessorPil(size=square)
    colours = imagenet if family.startswith("dino") else {}
    return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=square, **colours)


_BUILD = {
    "convnext": _convolutional,
    "convnextv2": _convolutional,
    "blip-2": _of_blip,
    "instructblip": _of_blip,
}
