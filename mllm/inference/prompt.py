"""From messages to what a model reads. All ids come from a processor's `encode_chat`, as in training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mllm.errors import RowError
from mllm.inference.limits import NO_LIMITS, MediaLimits
from mllm.inference.media import KINDS, NOUNS, Medium, counted, read_medium
from mllm.processing import TrainingProcessor
from mllm.processing.media import MediaInput
from mllm.processing.messages import plain_messages

Messages = list[dict[str, Any]]
"""[{"role": str, "content": str | list of content items}], with the items

- {"type": "text", "text": str},
- {"type": "image", "image": a PIL image, a file's path or its bytes},
- {"type": "audio", "audio": a file's path or its bytes}, and {"type": "video", "video": the same}; with `start` and
  `end`, in seconds, a part of it.
"""


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the point where the model has to speak; its media are not decoded yet."""

    input_ids: list[int]
    media: list[Medium] = field(default_factory=list)
    messages: Messages = field(default_factory=list)


def encode_prompt(processor: TrainingProcessor, messages: Messages, *, limits: MediaLimits = NO_LIMITS) -> Prompt:
    """Encode a conversation so that its ids end where an answer begins. Of media only the headers are read.

    Args:
        processor: Of the model.
        messages: The conversation.
        limits: How many media of which length it may hold.

    Raises:
        MediaError: A media item is missing, its header cannot be read, or it is over a limit.
        RowError: The messages are malformed, or hold media that the model does not read, or too large ones.
    """
    plain_messages(messages, where="the conversation", kinds=KINDS)  # before anything is looked up in them
    items = [item for message in messages for item in _media_items(message)]
    kinds = [item["type"] for item in items]
    _check_kinds(kinds, processor)
    limits.check_numbers(kinds)
    media = []
    for place, item in enumerate(items):
        number = kinds[: place + 1].count(kinds[place])
        media.append(read_medium(item, name=f"{NOUNS[kinds[place]]} {number} of the conversation"))
        limits.check_length(media[-1])
    sizes = [medium.size for medium in media]
    encoded = processor.encode_chat(messages, media_sizes=sizes, add_generation_prompt=True)
    return Prompt(input_ids=encoded.input_ids, media=media, messages=messages)


def model_inputs(
    processor: TrainingProcessor,
    prompts: list[Prompt],
    *,
    device: torch.device,
    change: Callable[[MediaInput], MediaInput] | None = None,
) -> dict[str, torch.Tensor]:
    """Batch prompts for `generate`: media decoded, ids padded on the left, so that all answers begin in one column.

    Args:
        processor: Of the model.
        prompts: As `encode_prompt` makes them.
        device: Where the model is.
        change: What is done to each decoded item, which has to keep its size.

    Raises:
        MediaError: A media item cannot be decoded.
    """
    longest = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), _padding_id(processor))
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        input_ids[row, start:] = torch.tensor(prompt.input_ids)
        attention_mask[row, start:] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    media = [medium.decoded(processor, row=row) for row, prompt in enumerate(prompts) for medium in prompt.media]
    media = media if change is None else [change(item) for item in media]
    inputs |= processor.encode_media(media) | processor.encode_questions([prompt.messages for prompt in prompts])
    inputs |= processor.text_inputs(input_ids)
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
        media = counted([medium.item.kind for medium in prompt.media]) or "no media"
        raise RowError(
            f"a conversation of {found} tokens, with {media}",
            expected=f"at most {limit - 1}, so that an answer fits into the model's context of {limit}",
            do="start a new conversation, or send shorter text or fewer and shorter media",
        )
    return min(max_new_tokens, limit - found)


def _padding_id(processor: TrainingProcessor) -> int:
    """Any id but a placeholder's will do where the mask is 0."""
    tokenizer = processor.tokenizer
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _media_items(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [] if isinstance(content, str) else [item for item in content if item["type"] != "text"]


def _check_kinds(kinds: list[str], processor: TrainingProcessor) -> None:
    """Before any file is opened: what cannot be read need not be there."""
    foreign = [kind for kind in kinds if kind not in processor.media_kinds]
    if foreign:
        raise RowError(
            f"the conversation: {foreign[0]}, which the model does not read",
            expected=f"media of kind {', '.join(processor.media_kinds) or 'none, but text alone'}",
            do="leave it out, or talk to a model that reads it",
        )
