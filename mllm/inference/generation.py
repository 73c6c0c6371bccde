"""How a model is set to generate, and how its tokens leave the thread it generates in."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from mllm.errors import OptionError


def generation_config(
    model: PreTrainedModel | PeftModel, *, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """The model's own settings (ends of turn, tokens never to be spoken), with this length and this temperature.

    Args:
        model: Its settings are copied, never changed.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; above it tokens are sampled.
    """
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens = {max_new_tokens}", expected="1 or more", do="set `max_new_tokens` higher")
    if temperature < 0:
        raise OptionError(f"temperature = {temperature}", expected="0 or more", do="set `temperature` to 0 for greedy")
    config = GenerationConfig.from_dict(model.generation_config.to_dict())
    config.max_new_tokens, config.max_length = max_new_tokens, None
    config.do_sample = temperature > 0
    config.temperature = temperature if temperature > 0 else 1.0
    if not config.do_sample:  # a model's own sampling settings would only make transformers warn
        config.top_p, config.top_k = 1.0, 50
    return config


def without_end(token_ids: list[int], config: GenerationConfig) -> list[int]:
    """The tokens before the first end of turn; a row that ended early is padded behind it."""
    return next((token_ids[:at] for at, token in enumerate(token_ids) if is_end(token, config)), token_ids)


def is_end(token_id: int, config: GenerationConfig) -> bool:
    """Whether this token ends an answer."""
    ends = config.eos_token_id
    return token_id in ends if isinstance(ends, list) else token_id == ends


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout inside; training mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class TokenQueue(BaseStreamer):
    """Generated tokens of one answer on their way to the thread that reads them.

    `generate` puts them in; iterating takes them out, until the end or the error that the generating thread met.
    """

    def __init__(self):
        self._items: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: once with the whole prompt, then with every new token."""
        if self._has_prompt:
            self._items.put(int(value))
        self._has_prompt = True

    def end(self) -> None:
        """Called by `generate` after the last token."""
        self._items.put(None)

    def fail(self, error: BaseException) -> None:
        """Called in place of `end` when generating broke off."""
        self._items.put(error)

    def __iter__(self) -> Iterator[int]:
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class StopWhenSet(StoppingCriteria):
    """Ends generation after the token in work once an event is set."""

    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), dtype=torch.bool, device=input_ids.device)
