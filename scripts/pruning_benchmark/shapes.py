"""Models of random weights with the shape of LLaVA-1.5 and of LLaVA-NeXT, and a prompt for each.

Depth and tokens are the published ones: 32 decoder layers; 576 and 5 x 576 patches; 64 tokens of text, 35 of them in
front. Widths are those of 7B on a GPU. Elsewhere they are what two cores can do, with the shares that the parts of 7B
have in the arithmetic of an unpruned prompt, since what pruning is worth follows from these: about 5 % in the encoder,
and in attention over 2880 visual tokens 12 % of what the weights take. So heads are much narrower than the model. Were
all widths reduced alike, attention, which grows with the square of the tokens but only once with the width, would take
78 %, and pruning would spare 8.7 times the arithmetic in place of the published 6.0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

from mllm.shapes import Tensor

TEXT_BEFORE, TEXT_BEHIND = 35, 29
"""Tokens: Vicuna's system prompt, and a question."""
IMAGE_TOKEN = 32_000


@dataclass(frozen=True)
class Size:
    """Of a model's parts.

    Args:
        text: Fields of the language model's config.
        vision: Fields of the encoder's.
    """

    text: dict[str, int]
    vision: dict[str, int]


LAYERS = {"num_hidden_layers": 32, "vocab_size": 32_064, "max_position_embeddings": 4096}
PATCHES = {"image_size": 336, "patch_size": 14}
SIZES: dict[str, Size] = {
    # 211 M in its layers, 7 M in its encoder.
    "cpu": Size(
        LAYERS | {"hidden_size": 640, "intermediate_size": 3264, "num_attention_heads": 2, "head_dim": 64},
        PATCHES
        | {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 6, "num_attention_heads": 5},
    ),
    # Vicuna-7B and CLIP ViT-L/14.
    "gpu": Size(
        LAYERS | {"hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32},
        PATCHES
        | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
    "quick": Size(
        LAYERS | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4},
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 336, "patch_size": 56,
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is measured: a model and the prompts it gets.

    Args:
        name: In tables.
        model: In eval mode on its device.
        inputs: For `generate`.
        of: How many visual tokens each picture has.
        budgets: How many of them pruners shall keep, on average over layers.
    """

    name: str
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    of: int
    budgets: tuple[int, ...]

    def repeated(self, batch: int) -> dict[str, Tensor]:
        """The prompts, so many times."""
        return {name: values.repeat(batch, *[1] * (values.dim() - 1)) for name, values in self.inputs.items()}


SHAPES: dict[str, dict[str, Any]] = {
    # Budgets: a third and a ninth, as the papers have them.
    "llava-1.5": {"family": "llava", "views": 1, "lines": 0, "budgets": (1 / 3, 1 / 9)},
    # An image of 2 x 2 tiles and its overview. The model puts a newline token behind each line of patches.
    "llava-next": {"family": "llava_next", "views": 5, "lines": 2, "budgets": (1 / 9,)},
}


def make_subject(shape: str, size: str, device: torch.device, budgets: Sequence[int] = ()) -> Subject:
    """A model and one prompt about one picture.

    Args:
        shape: A key of `SHAPES`.
        size: A key of `SIZES`.
        device: Where it is made; bfloat16 on a GPU, else float32.
        budgets: In place of the shape's own.
    """
    facts, parts = SHAPES[shape], SIZES[size]
    side, patch = parts.vision["image_size"], parts.vision["patch_size"]
    per_line = side // patch
    num_patches = facts["views"] * per_line**2
    num_tokens = num_patches + facts["lines"] * per_line
    return Subject(
        shape,
        _make_model(facts["family"], parts, device),
        _make_inputs(facts["views"], num_tokens, side, device),
        num_patches,
        tuple(budgets) or tuple(round(share * num_patches) for share in facts["budgets"]),
    )


def _make_model(family: str, parts: Size, device: torch.device) -> PreTrainedModel:
    side = parts.vision["image_size"]
    tiles = {"image_grid_pinpoints": [[2 * side, 2 * side]]} if family == "llava_next" else {}
    config = AutoConfig.for_model(
        family,
        vision_config={"model_type": "clip_vision_model", **parts.vision},
        text_config={"model_type": "llama", **parts.text, "num_key_value_heads": parts.text["num_attention_heads"]},
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        **tiles,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForMultimodalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    # Random weights speak no end of turn, and shall not by chance.
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False)


def _make_inputs(views: int, num_tokens: int, side: int, device: torch.device) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    text = torch.randint(3, IMAGE_TOKEN, (1, TEXT_BEFORE + TEXT_BEHIND), generator=random)
    image = torch.full((1, num_tokens), IMAGE_TOKEN)
    input_ids = torch.cat([text[:, :TEXT_BEFORE], image, text[:, TEXT_BEFORE:]], dim=1)
    pixels = torch.randn(1, views, 3, side, side, generator=random)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if views == 1:
        inputs["pixel_values"] = pixels[:, 0]
    else:
        inputs |= {"pixel_values": pixels, "image_sizes": torch.tensor([[2 * side, 2 * side]])}
    return {name: values.to(device) for name, values in inputs.items()}
