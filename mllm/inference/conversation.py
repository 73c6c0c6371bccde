"""Messages in, text out: one conversation streamed piece by piece, or many answered in batches."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from mllm.errors import OptionError
from mllm.inference.generation import StopWhenSet, TokenQueue, eval_mode, generation_config, is_end, without_end
from mllm.inference.limits import NO_LIMITS, MediaLimits
from mllm.inference.prompt import Messages, Prompt, encode_prompt, model_inputs, room_for_answer
from mllm.inference.text_stream import TextStream, decode_answer
from mllm.load import load_model, load_processor
from mllm.processing import TrainingProcessor
from mllm.processing.media import MediaInput

AttachPruner = Callable[[PreTrainedModel | PeftModel], AbstractContextManager]


class Chat:
    """A model to talk to.

    The caller keeps the conversation: each call gets all messages so far and answers the last one. Text in messages,
    the model's own included, is only ever text, whatever control tokens it spells.

    Calls may come from several threads; answers are generated one after another.

    Example:
        chat = Chat.from_pretrained("runs/quickstart/model")
        content = [{"type": "image", "image": "scene.png"}, {"type": "text", "text": "What is this?"}]
        for piece in chat.stream([{"role": "user", "content": content}]):
            print(piece, end="", flush=True)

    Args:
        model: Ours, a stock one, or one of these wrapped by PEFT; it stays on its device.
        processor: The processor saved with the model.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; above it tokens are sampled.
        pruner: Drops visual tokens while an answer is generated: called on the model, it is entered as a context.
        limits: How many media of which length a conversation may hold.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: TrainingProcessor,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        pruner: AttachPruner | None = None,
        limits: MediaLimits = NO_LIMITS,
    ):
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.pruner = pruner
        self.limits = limits
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        **options: Any,
    ) -> "Chat":
        """Load a checkpoint, an adapter's included, with its processor; `options` are those of `Chat`."""
        processor = load_processor(path)
        return cls(load_model(path, device=device, dtype=dtype), processor, **options)

    def reply(self, messages: Messages, *, max_new_tokens: int | None = None, temperature: float | None = None) -> str:
        """The whole answer to the last message."""
        return "".join(self.stream(messages, max_new_tokens=max_new_tokens, temperature=temperature))

    def stream(
        self, messages: Messages, *, max_new_tokens: int | None = None, temperature: float | None = None
    ) -> Iterator[str]:
        """The answer to the last message, in pieces of text as they are generated.

        Closing the iterator stops the generation after the token in work. What goes wrong in it is raised from the
        iterator.

        Args:
            messages: The conversation so far; see `mllm.inference.prompt.Messages`.
            max_new_tokens: For this answer, in place of the chat's own.
            temperature: For this answer, in place of the chat's own.

        Raises:
            RowError, MediaError: At once, before anything is generated: the messages are malformed, media cannot be
                read or are over a limit, or the conversation is longer than the model's context.
        """
        prompt = encode_prompt(self.processor, messages, limits=self.limits)
        wanted = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        config = generation_config(
            self.model,
            max_new_tokens=room_for_answer(self.model, prompt, max_new_tokens=wanted),
            temperature=self.temperature if temperature is None else temperature,
        )
        inputs = model_inputs(self.processor, [prompt], device=self.model.device)
        return self._pieces(inputs, config)

    def _pieces(self, inputs: dict[str, torch.Tensor], config: GenerationConfig) -> Iterator[str]:
        """Generate in a thread of its own and read along."""
        tokens, is_cancelled = TokenQueue(), threading.Event()
        worker = threading.Thread(target=self._work, args=(inputs, config, tokens, is_cancelled), daemon=True)
        worker.start()
        text = TextStream(self.processor.tokenizer)
        try:
            for token in tokens:
                if is_end(token, config):
                    break
                if piece := text.push(token):
                    yield piece
            if piece := text.end():
                yield piece
        finally:
            is_cancelled.set()
            worker.join()

    def _work(
        self,
        inputs: dict[str, torch.Tensor],
        config: GenerationConfig,
        tokens: TokenQueue,
        is_cancelled: threading.Event,
    ) -> None:
        """Wait until the model is free, then generate. The lock is held here: a reader that rests blocks nobody."""
        while not self._lock.acquire(timeout=0.05):
            if is_cancelled.is_set():
                return
        stopping = StoppingCriteriaList([StopWhenSet(is_cancelled)])
        try:
            with eval_mode(self.model), _pruned(self.model, self.pruner):
                self.model.generate(**inputs, generation_config=config, streamer=tokens, stopping_criteria=stopping)
        except BaseException as error:  # noqa: BLE001 - the reading thread raises it again
            tokens.fail(error)
        finally:
            self._lock.release()


def generate_answers(
    model: PreTrainedModel | PeftModel,
    processor: TrainingProcessor,
    conversations: list[Messages],
    *,
    batch_size: int,
    max_new_tokens: int,
    pruner: AttachPruner | None = None,
    change: Callable[[MediaInput], MediaInput] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Answer the last message of every conversation, greedily; the answers come in the order of the conversations.

    Conversations of like length share a batch. The answers do not depend on `batch_size`.

    Args:
        model: As for `Chat`.
        processor: The processor saved with the model.
        conversations: Messages, each list as for `Chat.stream`.
        batch_size: Conversations generated at once.
        max_new_tokens: Longest answer, in tokens.
        pruner: As for `Chat`; it is entered once for all answers.
        change: What is done to each decoded media item, which has to keep its size.
        progress: Called after every batch with the number of conversations it answered, e.g. a bar's `update`.

    Raises:
        RowError, MediaError: A conversation is malformed or too long, or a media item cannot be read. All but the
            decoding of media is checked before the first answer.
        OptionError: The model lacks what the pruner needs.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size = {batch_size}", expected="1 or more", do="set `batch_size` higher")
    prompts = [encode_prompt(processor, conversation) for conversation in conversations]
    rooms = [room_for_answer(model, prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    answers = [""] * len(prompts)
    with eval_mode(model), _pruned(model, pruner):
        for batch in _batches(prompts, rooms, batch_size=batch_size):
            config = generation_config(model, max_new_tokens=rooms[batch[0]], temperature=0.0)
            chosen = [prompts[index] for index in batch]
            inputs = model_inputs(processor, chosen, device=model.device, change=change)
            generated = model.generate(**inputs, generation_config=config)
            for index, row in zip(batch, generated[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                answers[index] = decode_answer(processor.tokenizer, without_end(row, config))
            if progress:
                progress(len(batch))
    return answers


def _pruned(model: PreTrainedModel | PeftModel, pruner: AttachPruner | None) -> AbstractContextManager:
    """A context in which the model generates from fewer visual tokens, where it is to."""
    return nullcontext() if pruner is None else pruner(model)


def _batches(prompts: list[Prompt], rooms: list[int], *, batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts of like length, longest first, with the same room for an answer.

    No answer may end earlier because of its neighbours in the batch.
    """
    longest_first = sorted(range(len(prompts)), key=lambda index: (rooms[index], -len(prompts[index].input_ids)))
    for _, group in groupby(longest_first, key=lambda index: rooms[index]):
        indices = list(group)
        yield from (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))
