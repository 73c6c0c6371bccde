"""Tiny checkpoints of stock models as the Hub has them: real processors, published chat templates, random weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from mllm.processing.stock_loading import VideoSettings, processor_class
from mllm.testing import tiny_tokenizer
from mllm.testing_stock import IMAGE_SIDE, tiny_stock_config, tiny_stock_model

SPARE_ROWS = 4
"""Rows of the embedding above the tokenizer's ids, as many models have them."""


class _Tokens(NamedTuple):
    """A tiny tokenizer's special tokens.

    Args:
        kind: See `tiny_tokenizer`.
        named: Those that the tokenizer gives by a name of their own (`tokenizer.image_token`).
        others: Further ones.
        end_of_turn: What ends an answer.
        bos: Where it differs from the kind's.
        config: Fields of the model's config, and the token whose id they hold.
    """

    kind: str
    config: dict[str, str]
    end_of_turn: str
    named: dict[str, str] = {}
    others: Sequence[str] = ()
    bos: str | None = None


def save_stock_checkpoint(directory: str | Path, family: str, **fields: Any) -> Path:
    """Write a checkpoint of a stock family, as tiny as `tiny_stock_model`, and return its directory.

    Args:
        directory: Made if it is not there.
        family: One of `mllm.testing_stock.STOCK_FAMILIES`.
        **fields: Further fields of the model's config.
    """
    directory = Path(directory)
    tokenizer = stock_tokenizer(family)
    if family == "qwen2_audio":  # the encoder takes sounds of one length, that of the feature extractor
        audio = tiny_stock_config(family).audio_config.to_dict()
        fields = {"audio_config": audio | {"max_source_positions": 50}, **fields}
    ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in _TOKENS[family].config.items()}
    model = tiny_stock_model(family, vocab_size=len(tokenizer) + SPARE_ROWS, **ids, **fields)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(_TOKENS[family].end_of_turn)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    stock_processor(family, tokenizer).save_pretrained(directory)
    return directory


def stock_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with the family's special tokens."""
    tokens = _TOKENS[family]
    tokenizer = tiny_tokenizer(tokens.kind)
    texts = [*tokens.named.values(), *tokens.others]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in texts], special_tokens=True)
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        **{name: token for name, token in names.items() if token is not None}
        | ({} if tokens.bos is None else {"bos_token": tokens.bos}),
        extra_special_tokens=dict(tokens.named),
    )


def stock_processor(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """The family's processor around a tiny tokenizer, with the chat template as published."""
    return _PROCESSORS[family](family, tokenizer)


_MARKS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_QWEN_VL = _Tokens(
    "qwen",
    {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "<|im_end|>",
    others=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_IDEFICS3: dict[str, Any] = {
    "config": {"image_token_id": "<image>"},
    "end_of_turn": "<end_of_utterance>",
    "others": ("<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>", *_MARKS),
}

_TOKENS = {
    "llava": _Tokens("llama2", {"image_token_id": "<image>"}, "</s>", others=("<image>",)),
    "llava_next": _Tokens("llama2", {"image_token_id": "<image>"}, "</s>", others=("<image>",)),
    "llava_onevision": _Tokens(
        "qwen",
        {"image_token_id": "<image>", "video_token_id": "<video>"},
        "<|im_end|>",
        others=("<image>", "<video>"),
    ),
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN_VL,
    "internvl": _Tokens(
        "qwen",
        {"image_token_id": "<IMG_CONTEXT>"},
        "<|im_end|>",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "smolvlm": _Tokens("qwen", **_IDEFICS3, bos="<|im_start|>"),
    "idefics3": _Tokens("llama3", **_IDEFICS3),
    "gemma3": _Tokens(
        "llama2",
        {
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        "<end_of_turn>",
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        others=("<start_of_turn>", "<end_of_turn>"),
    ),
    "qwen2_audio": _Tokens(
        "qwen",
        {"audio_token_index": "<|AUDIO|>"},
        "<|im_end|>",
        others=("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    ),
}


def _llava(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    return processor_class("LlavaProcessor")(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )


def _llava_next(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    return processor_class("LlavaNextProcessor")(
        image_processor=transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIDE},
            crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
            image_grid_pinpoints=tiny_stock_config(family).image_grid_pinpoints,
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT_MISTRAL,
    )


def _llava_onevision(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    return processor_class("LlavaOnevisionProcessor")(
        image_processor=transformers.LlavaOnevisionImageProcessorPil(
            size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
            image_grid_pinpoints=tiny_stock_config(family).image_grid_pinpoints,
        ),
        tokenizer=tokenizer,
        video_processor=VideoSettings(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_ONEVISION,
    )


def _qwen_vl(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    name, template = {
        "qwen2_5_vl": ("Qwen2_5_VLProcessor", QWEN2_VL),
        "qwen3_vl": ("Qwen3VLProcessor", QWEN3_VL),
    }[family]
    vision = tiny_stock_config(family).vision_config
    return processor_class(name)(
        image_processor=transformers.Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32},
        ),
        tokenizer=tokenizer,
        video_processor=VideoSettings(merge_size=vision.spatial_merge_size, patch_size=vision.patch_size),
        chat_template=template,
    )


def _internvl(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    return processor_class("InternVLProcessor")(
        image_processor=transformers.GotOcr2ImageProcessorPil(
            size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer,
        video_processor=VideoSettings(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
        image_seq_length=4,
        chat_template=INTERNVL,
    )


def _idefics3(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    name, image_processor = {
        "idefics3": ("Idefics3Processor", transformers.Idefics3ImageProcessorPil),
        "smolvlm": ("SmolVLMProcessor", transformers.SmolVLMImageProcessorPil),
    }[family]
    video = {"video_processor": VideoSettings(num_frames=4, fps=1)} if family == "smolvlm" else {}
    return processor_class(name)(
        image_processor=image_processor(
            size={"longest_edge": 2 * IMAGE_SIDE}, max_image_size={"longest_edge": IMAGE_SIDE}
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS3 if family == "idefics3" else SMOLVLM,
        **video,
    )


def _gemma3(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    return processor_class("Gemma3Processor")(
        image_processor=transformers.Gemma3ImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=GEMMA3,
    )


def _qwen2_audio(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """Sounds of at most a second: 100 mel frames, which become 25 tokens."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    return processor_class("Qwen2AudioProcessor")(
        feature_extractor=extractor, tokenizer=tokenizer, chat_template=QWEN2_AUDIO
    )


_PROCESSORS: dict[str, Callable[[str, PreTrainedTokenizerFast], ProcessorMixin]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen_vl,
    "qwen3_vl": _qwen_vl,
    "internvl": _internvl,
    "smolvlm": _idefics3,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "qwen2_audio": _qwen2_audio,
}

# As published with the checkpoints on the Hub.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_NEXT_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] "
    "+ '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '<\\\\s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAVA_ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] "
    "== 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}"
    "Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
QWEN3_VL = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}{%- if message.content is string %}"
    "{{- message.content }}{%- else %}{%- for content in message.content %}{%- if content.type == 'image' or 'image' "
    "in content or 'image_url' in content %}<|vision_start|><|image_pad|><|vision_end|>{%- elif 'text' in content %}"
    "{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt "
    "%}{{'<|im_start|>assistant\n' }}{% endif %}"
)
_CAPITALS = (
    "{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IDEFICS3 = "<|begin_of_text|>" + _CAPITALS
SMOLVLM = "<|im_start|>" + _CAPITALS
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
QWEN2_AUDIO = (
    "{% set audio_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != "
    "'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>"
    "{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if 'audio' in content or 'audio_url' in content or message['type'] == "
    "'audio' or content['type'] == 'audio' %}{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
