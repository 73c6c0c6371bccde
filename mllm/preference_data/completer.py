"""Write the masked phrases of an answer anew while looking at another image: three ways to do it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import LogitsProcessorList, PreTrainedModel

from mllm.errors import OptionError, RowError
from mllm.inference import generate_answers
from mllm.inference.generation import eval_mode, generation_config
from mllm.inference.prompt import Messages, Prompt, encode_prompt, model_inputs, room_for_answer
from mllm.preference_data.answer_ids import continuation_ids, encode_answer
from mllm.preference_data.endpoint import Endpoint, Failure, Question
from mllm.preference_data.gap_writer import Gap, GapWriter, GapWriting
from mllm.preference_data.image_urls import image_url
from mllm.preference_data.phrases import MASK, NO_PHRASE, NO_ROOM, Completion, Masked, Task
from mllm.preference_data.replies import plain_reply
from mllm.processing import TrainingProcessor

COMPLETE_PROMPT = "Please complete the following sentence based on the input image by filling in the masked segments."
"""The paper's (appendix C)."""
MASK_NOTE = f"Each {MASK} stands for some words. Reply with the completed text alone."
"""Ours, for models that would explain themselves."""
SPARE_TOKENS = 8
"""How much longer than its length a gap may get before it ends in the middle of a word."""


class ForcedCompleter:
    """Keeps the unmasked words and lets the model write into the gaps alone, as it goes on from what stands before.

    Works for models that follow no instructions. The gaps are written greedily, from the question, the retrieved image
    and the words before; what comes behind a gap is not seen.

    Args:
        model: Ours or a stock one, or one of these wrapped by PEFT; it stays on its device.
        processor: The processor saved with the model.
        batch_size: Answers completed at once. It does not change them.
        slack: How many tokens longer than the phrase it replaces a gap may get.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: TrainingProcessor,
        *,
        batch_size: int = 8,
        slack: int = 4,
    ):
        self.model, self.processor, self.batch_size, self.slack = model, processor, batch_size, slack
        self._ends = _end_ids(model)

    def complete(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Completion]]:
        """Each task's index and its completion, batch by batch.

        Raises:
            RowError, MediaError: A task's messages are malformed, or a medium in them cannot be read.
        """
        begun: dict[int, _Begun] = {}
        for index, task in enumerate(tasks):
            one = self._begin(task) if task.masked.phrases else Completion("", NO_PHRASE)
            if isinstance(one, Completion):
                yield index, one
            else:
                begun[index] = one
        order = sorted(begun, key=lambda index: -begun[index].longest)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            texts = self._write([begun[index] for index in batch])
            yield from ((index, Completion(text)) for index, text in zip(batch, texts, strict=True))

    def _begin(self, task: Task) -> "_Begun | Completion":
        """A prompt that ends where the first gap begins, and what comes after; or why there is no room for it."""
        prompt = self._prompt(task)
        gaps = gaps_of(task.masked, self.processor, slack=self.slack)
        writer = GapWriter(gaps, last_id=prompt.input_ids[-1], tokenizer=self.processor.tokenizer, end_ids=self._ends)
        try:
            room = room_for_answer(self.model, prompt, max_new_tokens=writer.most_tokens)
        except RowError:
            return Completion("", NO_ROOM)
        return _Begun(task.masked, prompt, writer) if room == writer.most_tokens else Completion("", NO_ROOM)

    def _prompt(self, task: Task) -> Prompt:
        prompt = encode_prompt(self.processor, task.messages)
        opening = task.masked.kept[0].rstrip()
        if not opening:
            return prompt
        sizes = [medium.size for medium in prompt.media]
        answer = encode_answer(self.processor, opening, messages=task.messages, media_sizes=sizes)
        ids = answer.input_ids[: answer.end]
        if ids[: len(prompt.input_ids)] != prompt.input_ids:  # the template opens an answer with more than it keeps
            ids = prompt.input_ids + answer.words
        return replace(prompt, input_ids=ids)

    def _write(self, batch: Sequence["_Begun"]) -> list[str]:
        writers = [one.writer for one in batch]
        config = generation_config(
            self.model, max_new_tokens=max(writer.most_tokens for writer in writers), temperature=0.0
        )
        inputs = model_inputs(self.processor, [one.prompt for one in batch], device=self.model.device)
        with eval_mode(self.model), torch.no_grad():
            self.model.generate(
                **inputs, generation_config=config, logits_processor=LogitsProcessorList([GapWriting(writers)])
            )
        return [one.masked.filled(one.writer.words) for one in batch]


def gaps_of(masked: Masked, processor: TrainingProcessor, *, slack: int) -> list[Gap]:
    """A masked answer's gaps, in a processor's tokens; each may be `slack` tokens longer than its phrase."""
    gaps = []
    for before, words, after in zip(masked.kept[:-1], masked.words, masked.kept[1:], strict=True):
        then = after.rstrip()
        length = len(continuation_ids(processor, f" {words}")) + slack
        gap = Gap(
            then=continuation_ids(processor, then) if then else [],
            is_apart=None if not before or before.endswith("\n") else before[-1].isspace(),
            own=frozenset(words.lower().split()) | frozenset(sign for sign in words if not sign.isalnum()),
            length=length,
            most=length + SPARE_TOKENS,
        )
        gaps.append(gap)
    return gaps


class _Begun(NamedTuple):
    masked: Masked
    prompt: Prompt
    writer: GapWriter

    @property
    def longest(self) -> int:
        """Tokens of the prompt and of the longest answer to it."""
        return len(self.prompt.input_ids) + self.writer.most_tokens


class InstructedCompleter:
    """Asks the model to fill in the masks, with the paper's prompt; the model may write other words elsewhere, too.

    Args:
        model: Ours or a stock one, or one of these wrapped by PEFT; it stays on its device.
        processor: The processor saved with the model.
        batch_size: Answers completed at once.
        max_new_tokens: Longest completion.
        prompt: What is asked, in front of the masked answer.
        keeps_question: Whether the row's own messages stand before it; else its media alone, as in the paper.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: TrainingProcessor,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 512,
        prompt: str = f"{COMPLETE_PROMPT} {MASK_NOTE}",
        keeps_question: bool = True,
    ):
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.max_new_tokens, self.prompt, self.keeps_question = max_new_tokens, prompt, keeps_question

    def complete(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Completion]]:
        """Each task's index and its completion, batch by batch.

        Raises:
            RowError, MediaError: A task's messages are malformed, or a medium in them cannot be read.
        """
        asked: dict[int, Messages] = {}
        for index, task in enumerate(tasks):
            messages = instruction(task, self.prompt, keeps_question=self.keeps_question)
            if not task.masked.phrases:
                yield index, Completion("", NO_PHRASE)
            elif self._has_room(messages):
                asked[index] = messages
            else:
                yield index, Completion("", NO_ROOM)
        order = sorted(asked, key=lambda index: -len(tasks[index].masked.text))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            answers = generate_answers(
                self.model,
                self.processor,
                [asked[index] for index in batch],
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
            )
            yield from ((index, Completion(plain_reply(text))) for index, text in zip(batch, answers, strict=True))

    def _has_room(self, messages: Messages) -> bool:
        prompt = encode_prompt(self.processor, messages)
        try:
            room_for_answer(self.model, prompt, max_new_tokens=1)
        except RowError:
            return False
        return True


class EndpointCompleter:
    """Asks a model that sees images behind an OpenAI-compatible endpoint, with the paper's prompt.

    Args:
        endpoint: Where to ask.
        prompt: What is asked, in front of the masked answer.
        keeps_question: As for `InstructedCompleter`.
        longest_side: Images are sent no larger, in pixels.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        prompt: str = f"{COMPLETE_PROMPT} {MASK_NOTE}",
        keeps_question: bool = True,
        longest_side: int = 1024,
    ):
        self.endpoint, self.prompt = endpoint, prompt
        self.keeps_question, self.longest_side = keeps_question, longest_side

    def complete(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Completion]]:
        """Each task's index and its completion, as replies come.

        Raises:
            EndpointError: The endpoint cannot be used; what came before has been given.
            RowError, MediaError: A task has a medium that is no image, or cannot be read.
        """
        yield from ((index, Completion("", NO_PHRASE)) for index, task in enumerate(tasks) if not task.masked.phrases)
        indices = [index for index, task in enumerate(tasks) if task.masked.phrases]
        for number, found in self.endpoint.ask_all([self._question(tasks[index]) for index in indices]):
            failed = isinstance(found, Failure)
            yield indices[number], Completion("", found.reason) if failed else Completion(found)

    def _question(self, task: Task) -> Question:
        messages = instruction(task, self.prompt, keeps_question=self.keeps_question)
        return Question(messages=lambda: [self._sent(message) for message in messages], read=_completed)

    def _sent(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message["content"]
        if isinstance(content, str):
            return {"role": message["role"], "content": content}
        items = [item if item["type"] == "text" else image_url(item, self.longest_side) for item in content]
        return {"role": message["role"], "content": items}


def instruction(task: Task, prompt: str, *, keeps_question: bool) -> Messages:
    """The messages that ask for a completion: the row's own with the prompt behind the last, or its media with it."""
    asked = {"type": "text", "text": f"{prompt}\n\n{task.masked.masked_text}"}
    items = [item for message in task.messages for item in _items(message) if item["type"] != "text"]
    if not keeps_question:
        return [{"role": "user", "content": [*items, asked]}]
    *before, last = task.messages
    asked["text"] = "\n\n" + asked["text"]
    return [*before, {"role": last["role"], "content": [*_items(last), asked]}]


def _items(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _completed(reply: str) -> str:
    text = plain_reply(reply)
    if MASK.casefold() in text.casefold():
        raise RowError(
            f"the reply {reply!r:.200}",
            expected=f"a text without {MASK}",
            do="ask again, or ask a model that follows instructions better",
        )
    return text


def _end_ids(model: PreTrainedModel | PeftModel) -> list[int]:
    """The tokens at which the model's generation ends, the first of them to be written."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise OptionError(
            "a model whose generation_config names no `eos_token_id`",
            expected="the token that ends an answer",
            do="set it, as `assemble` does",
        )
    return list(ends) if isinstance(ends, list) else [ends]
