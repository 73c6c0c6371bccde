"""Tiny random models of transformers' own multimodal classes, made in memory from their configs, for tests."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel

WIDTH = 32
IMAGE_SIDE = 16


def tiny_stock_model(family: str, *, vocab_size: int = 400, **fields: Any) -> PreTrainedModel:
    """A random model of a stock class, two layers deep in its language model, in eval mode.

    Args:
        family: One of `STOCK_FAMILIES`: transformers' model type.
        vocab_size: Of the language model. Unless `fields` say otherwise the last ids are the media's: image (or audio)
            -1, video -2, start of media -3, end of media -4, counted from the end.
        **fields: Further fields of the model's config, such as `image_token_id`.
    """
    torch.manual_seed(2)
    model = AutoModelForMultimodalLM.from_config(tiny_stock_config(family, vocab_size=vocab_size, **fields)).eval()
    # What a checkpoint never has at zero; Gemma 3's projection is, and then nothing behind it would get a gradient.
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def tiny_stock_config(family: str, *, vocab_size: int = 400, **fields: Any) -> PreTrainedConfig:
    """The config of `tiny_stock_model`, with `fields` in place of its own."""
    return AutoConfig.for_model(family, **{**_FAMILIES[family](vocab_size), **fields})


def tiny_stock_batch(model: PreTrainedModel, *, num_rows: int = 2, media: bool = True) -> dict[str, torch.Tensor]:
    """A batch of random rows with one media item each, as the model's processor would make it, with labels.

    Args:
        model: Of `tiny_stock_model`.
        num_rows: How many rows; the last is a little shorter than the others and padded on the right.
        media: Whether the rows have their media item.
    """
    config = model.config
    vocab_size = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(3)
    tensors, span = _MEDIA[config.model_type](config, num_rows, generator) if media else ({}, [])
    text = torch.randint(0, vocab_size - 8, (num_rows, 12), generator=generator)
    placeholders = torch.tensor(span, dtype=torch.long).expand(num_rows, -1)
    input_ids = torch.cat([text[:, :3], placeholders, text[:, 3:]], dim=1)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, -2:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, : 5 + len(span)] = -100
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, **tensors}
    if config.model_type in _WITH_TYPES:
        is_image = input_ids == config.image_token_id
        batch[_WITH_TYPES[config.model_type]] = is_image.long()
    return batch


def _text(vocab_size: int, **fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **fields,
    }


def _vision(**fields: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIDE,
        **fields,
    }


def _qwen_vision(**fields: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "out_hidden_size": WIDTH,
        **fields,
    }


_CLIP = _vision(model_type="clip_vision_model", patch_size=8, projection_dim=WIDTH)
_SIGLIP = _vision(model_type="siglip_vision_model", patch_size=8, vision_use_head=False)
_PINPOINTS = [[IMAGE_SIDE, 2 * IMAGE_SIDE], [2 * IMAGE_SIDE, IMAGE_SIDE], [2 * IMAGE_SIDE, 2 * IMAGE_SIDE]]
_M_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}


def _llava(vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": dict(_CLIP),
        "text_config": _text(vocab_size, model_type="llama"),
        "image_token_id": vocab_size - 1,
        "image_seq_length": 4,
    }


def _llava_next(vocab_size: int) -> dict[str, Any]:
    return {**_llava(vocab_size), "image_grid_pinpoints": _PINPOINTS}


def _llava_onevision(vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": dict(_SIGLIP),
        "text_config": _text(vocab_size, model_type="qwen2"),
        "image_token_id": vocab_size - 1,
        "video_token_id": vocab_size - 2,
        "image_grid_pinpoints": _PINPOINTS,
    }


def _qwen_ids(vocab_size: int) -> dict[str, Any]:
    return {
        "image_token_id": vocab_size - 1,
        "video_token_id": vocab_size - 2,
        "vision_start_token_id": vocab_size - 3,
        "vision_end_token_id": vocab_size - 4,
    }


def _qwen2_5_vl(vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        "text_config": _text(vocab_size, rope_parameters=_M_ROPE),
        **_qwen_ids(vocab_size),
    }


def _qwen3_vl(vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _qwen_vision(depth=3, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
        # One layer more than feature maps handed in after layers: what comes in after the last reaches no answer.
        "text_config": _text(vocab_size, num_hidden_layers=3, head_dim=8, rope_parameters=_M_ROPE),
        **_qwen_ids(vocab_size),
    }


def _internvl(vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _vision(num_hidden_layers=2, image_size=[IMAGE_SIDE] * 2, patch_size=[4, 4]),
        "text_config": _text(vocab_size, model_type="qwen2"),
        "image_token_id": vocab_size - 1,
        "image_seq_length": 4,
    }


def _idefics3(vocab_size: int) -> dict[str, Any]:
    return {
        "vision_config": _vision(num_hidden_layers=2, patch_size=4),
        "text_config": _text(vocab_size, model_type="llama"),
        "image_token_id": vocab_size - 1,
        "scale_factor": 2,
    }


def _gemma3(vocab_size: int) -> dict[str, Any]:
    layer_types = ["sliding_attention", "full_attention"]
    return {
        "vision_config": {**_SIGLIP, "patch_size": 4},
        "text_config": _text(vocab_size, head_dim=8, sliding_window=16, layer_types=layer_types),
        "mm_tokens_per_image": 4,
        "image_token_index": vocab_size - 1,
        "boi_token_index": vocab_size - 3,
        "eoi_token_index": vocab_size - 4,
    }


def _qwen2_audio(vocab_size: int) -> dict[str, Any]:
    return {
        "audio_config": {
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "d_model": WIDTH,
            "max_source_positions": 20,
        },
        "text_config": _text(vocab_size, model_type="qwen2"),
        "audio_token_index": vocab_size - 1,
    }


_FAMILIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "smolvlm": _idefics3,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "qwen2_audio": _qwen2_audio,
}
STOCK_FAMILIES = tuple(_FAMILIES)
"""Families that `tiny_stock_model` makes."""

_WITH_TYPES = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids"}
"""Families whose processor marks the tokens of media, and the name under which it does."""


def _images(config: PreTrainedConfig, num_rows: int, generator: torch.Generator) -> tuple[dict, list[int]]:
    """One image of the encoder's native size for each row: 4 vectors."""
    shape = (num_rows, 3, IMAGE_SIDE, IMAGE_SIDE)
    return {"pixel_values": torch.randn(shape, generator=generator)}, [config.image_token_id] * 4


def _split_images(config: PreTrainedConfig, num_rows: int, generator: torch.Generator) -> tuple[dict, list[int]]:
    """One image of 1 x 2 tiles and an overview: 4 vectors each, and a newline vector for each row of vectors."""
    tensors = {
        "pixel_values": torch.randn((num_rows, 3, 3, IMAGE_SIDE, IMAGE_SIDE), generator=generator),
        "image_sizes": torch.tensor([[IMAGE_SIDE, 2 * IMAGE_SIDE]] * num_rows),
    }
    return tensors, [config.image_token_id] * (4 + 8 + 2)


def _nested_images(config: PreTrainedConfig, num_rows: int, generator: torch.Generator) -> tuple[dict, list[int]]:
    """One image for each row of the batch: 16 patches shuffled into 4 vectors."""
    pixels = torch.randn((num_rows, 1, 3, IMAGE_SIDE, IMAGE_SIDE), generator=generator)
    return {"pixel_values": pixels}, [config.image_token_id] * 4


def _patches(config: PreTrainedConfig, num_rows: int, generator: torch.Generator) -> tuple[dict, list[int]]:
    """One image of 4 x 4 patches, flattened: 4 vectors."""
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    tensors = {
        "pixel_values": torch.randn((num_rows * 16, width), generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * num_rows),
    }
    return tensors, [config.vision_start_token_id] + [config.image_token_id] * 4


def _sounds(config: PreTrainedConfig, num_rows: int, generator: torch.Generator) -> tuple[dict, list[int]]:
    """One sound of 40 mel frames: 10 vectors."""
    tensors = {
        "input_features": torch.randn((num_rows, 16, 40), generator=generator),
        "feature_attention_mask": torch.ones(num_rows, 40, dtype=torch.long),
    }
    return tensors, [config.audio_token_index] * 10


_MEDIA: dict[str, Callable[[PreTrainedConfig, int, torch.Generator], tuple[dict, list[int]]]] = {
    "llava": _images,
    "llava_next": _split_images,
    "llava_onevision": _split_images,
    "qwen2_5_vl": _patches,
    "qwen3_vl": _patches,
    "internvl": _images,
    "smolvlm": _nested_images,
    "idefics3": _nested_images,
    "gemma3": _images,
    "qwen2_audio": _sounds,
}
