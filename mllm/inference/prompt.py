"""From messages to what a model reads. All ids come from a processor's `encode_chat`, as in training."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import PreTrainedModel

from mllm.errors import MediaError, RowError
from mllm.processing import TrainingProcessor
from mllm.processing.images import ImageSource, decode_image, image_size
from mllm.processing.media import MediaInput
from mllm.processing.messages import plain_messages

Messages = list[dict[str, Any]]
"""[{"role": str, "content": str | list of {"type": "text", "text": str} and {"type": "image", "image": ImageSource}}]

An `ImageSource` is a PIL image, a file's path or its bytes.
"""


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the point where the model has to speak; its images are not decoded yet."""

    input_ids: list[int]
    images: list[ImageSource]


def encode_prompt(processor: TrainingProcessor, messages: Messages) -> Prompt:
    """Encode a conversation so that its ids end where an answer begins. Of images only the size is read.

    Raises:
        MediaError: An image is missing, or its header cannot be read.
        RowError: The messages are malformed.
    """
    plain_messages(messages, where="the conversation")  # before anything is looked up in them
    images: list[Any] = [item.get("image") for message in messages for item in _image_items(message)]
    sizes = [_size(image, where=_name(number)) for number, image in enumerate(images, start=1)]
    encoded = processor.encode_chat(messages, media_sizes=sizes, add_generation_prompt=True)
    return Prompt(input_ids=encoded.input_ids, images=images)


def model_inputs(
    processor: TrainingProcessor, prompts: list[Prompt], *, device: torch.device
) -> dict[str, torch.Tensor]:
    """Batch prompts for `generate`: images decoded, ids padded on the left, so that all answers begin in one column.

    Raises:
        MediaError: An image cannot be decoded.
    """
    longest = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), _padding_id(processor))
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        input_ids[row, start:] = torch.tensor(prompt.input_ids)
        attention_mask[row, start:] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    media = [
        MediaInput("image", image, (image.height, image.width), row)
        for row, prompt in enumerate(prompts)
        for image in _decoded(prompt)
    ]
    inputs |= processor.encode_media(media) | processor.text_inputs(input_ids)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def room_for_answer(model: PreTrainedModel | PeftModel, prompt: Prompt, *, max_new_tokens: int) -> int:
    """How many tokens may follow the prompt: `max_new_tokens`, or what the model's context length leaves of them.

    Raises:
        RowError: Nothing may.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:  # Mamba, Bloom
        return max_new_tokens
    found = len(prompt.input_ids)
    if found >= limit:
        raise RowError(
            f"a conversation of {found} tokens, with {len(prompt.images)} images",
            expected=f"at most {limit - 1}, so that an answer fits into the model's context of {limit}",
            do="start a new conversation, or send shorter text or fewer images",
        )
    return min(max_new_tokens, limit - found)


def _padding_id(processor: TrainingProcessor) -> int:
    """Any id but a placeholder's will do where the mask is 0."""
    tokenizer = processor.tokenizer
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _name(number: int) -> str:
    return f"image {number} of the conversation"


def _decoded(prompt: Prompt) -> list[Image.Image]:
    return [decode_image(image, where=_name(number)) for number, image in enumerate(prompt.images, start=1)]


def _image_items(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [] if isinstance(content, str) else [item for item in content if item["type"] == "image"]


def _size(source: Any, *, where: str) -> tuple[int, int]:
    """Height and width of an image as it will be decoded."""
    if isinstance(source, ImageSource):
        return image_size(source, where=where)
    raise MediaError(
        f"{where} given as {type(source).__name__}",
        expected="a PIL image, a path or bytes under the key `image`",
        do='write the item as {"type": "image", "image": ...}',
    )
