"""The models that are trained: stock classes made from configs, saved with a real tokenizer and processor."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mllm.processing.control import add_placeholder
from mllm.testing import tiny_tokenizer

TOKENS = 8_000
"""Of the tokenizer, trained on the mixture's own texts. A model's vocabulary may have more rows than that."""
TEMPLATE = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {%- for item in message.content -%}{{- item.text -}}{%- endfor -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {%- for item in message.content -%}
            {%- if item.type == 'image' -%}{{- '<image>\n' -}}{%- else -%}{{- item.text -}}{%- endif -%}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""ChatML with `generation` marks, so that TRL's `assistant_only_loss` and ours learn the same tokens."""

TEXT: dict[str, int] = {"hidden_size": 320, "layers": 8, "intermediate_size": 1216, "heads": 5}
VISION: dict[str, int] = {"hidden_size": 256, "layers": 6, "intermediate_size": 1024, "heads": 4}
TINY: dict[str, int] = {"hidden_size": 64, "layers": 2, "intermediate_size": 128, "heads": 2}
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    # LLaVA-1.5's vocabulary, which does not shrink with a model. The head is 48 % of the weights that the language
    # model multiplies with: 28 % in Qwen2.5-0.5B, 63 % in Gemma 3 270M, 2 % in a 7B model.
    "throughput": {"text": TEXT | {"vocab_size": 32_064}, "vision": VISION},
    # To see how much hangs on that: 32 %.
    "small_head": {"text": TEXT | {"vocab_size": 16_384}, "vision": VISION},
    # Qwen's vocabulary, head and embedding tied as in its models up to 4B, and CLIP-L's 576 tokens an image.
    "memory": {"text": TEXT | {"vocab_size": 151_936, "tied": 1}, "vision": VISION | {"image_size": 336, "patch": 14}},
    # An encoder as deep as ViT-B, of which the last layer is cut off.
    "alignment": {"text": TEXT | {"vocab_size": 32_064}, "vision": VISION | {"layers": 13}},
    # For loss curves, which need many steps more than a large model.
    "curves": {
        "text": {"hidden_size": 128, "layers": 4, "intermediate_size": 384, "heads": 4, "vocab_size": 8_192},
        "vision": TINY,
    },
    "quick": {"text": TINY | {"vocab_size": 8_192}, "vision": TINY},
    # For a GPU: more than a billion parameters, CLIP-L's encoder.
    "gpu": {
        "text": {
            "hidden_size": 2048, "layers": 20, "intermediate_size": 5632, "heads": 16, "vocab_size": 151_936,
        },
        "vision": {"hidden_size": 1024, "layers": 24, "intermediate_size": 4096, "heads": 16},
    },
}  # fmt: skip
IMAGE_SIZE, PATCH = 224, 16
"""Where a shape does not say otherwise: 196 tokens."""


def make_checkpoint(directory: Path, shape: str, rows: Path) -> Path:
    """Save the model of this shape, unless it is there; returns its directory."""
    path = directory / shape
    if (path / "complete").exists():
        return path
    tokenizer = make_tokenizer(rows)
    vision = SHAPES[shape]["vision"]
    processor = LlavaProcessor(
        image_processor=make_image_processor(vision.get("image_size", IMAGE_SIZE)),
        tokenizer=tokenizer,
        patch_size=vision.get("patch", PATCH),
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(make_config(SHAPES[shape], tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    processor.save_pretrained(path)
    (path / "complete").touch()
    return path


def make_image_processor(side: int) -> CLIPImageProcessorPil:
    """CLIP's, for images of this side."""
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def make_config(shape: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """LLaVA: CLIP, two linear layers, and a language model."""
    vision = shape["vision"]
    vision_config = CLIPVisionConfig(
        hidden_size=vision["hidden_size"],
        num_hidden_layers=vision["layers"],
        intermediate_size=vision["intermediate_size"],
        num_attention_heads=vision["heads"],
        image_size=vision.get("image_size", IMAGE_SIZE),
        patch_size=vision.get("patch", PATCH),
    )
    return LlavaConfig(
        vision_config=vision_config,
        text_config=make_text_config(
            shape["text"], eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(shape["text"].get("tied")),
    )


def make_text_config(text: dict[str, int], **tokens: int | None) -> Qwen2Config:
    """A language model with grouped-query attention, as Qwen2 has it."""
    return Qwen2Config(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        num_hidden_layers=text["layers"],
        intermediate_size=text["intermediate_size"],
        num_attention_heads=text["heads"],
        num_key_value_heads=num_key_value_heads(text["heads"]),
        max_position_embeddings=4096,
        tie_word_embeddings=bool(text.get("tied")),
        bos_token_id=None,
        **tokens,
    )


def num_key_value_heads(num_heads: int) -> int:
    """Half as many as heads, or one where they are odd in number."""
    return 1 if num_heads % 2 else num_heads // 2


def make_tokenizer(rows: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of Qwen's construction, trained on the rows."""
    tokenizer = tiny_tokenizer("qwen")
    trainer = BpeTrainer(vocab_size=TOKENS, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.backend_tokenizer.train_from_iterator(texts_of(rows), trainer)
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    add_placeholder(tokenizer, "<image>", num_rows=len(tokenizer) + 1)
    return tokenizer


def texts_of(rows: Path) -> list[str]:
    """All texts of a file of rows."""
    lines = rows.read_text(encoding="utf-8").splitlines()
    contents = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    return [item["text"] for content in contents for item in content if item["type"] == "text"]
