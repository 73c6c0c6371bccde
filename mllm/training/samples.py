"""Shows now and then what the model answers to a row that it is not trained on."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback

from mllm.data.collate import PaddingCollator
from mllm.data.examples import Example, Examples
from mllm.data.labels import IGNORED
from mllm.data.pairs import Pair
from mllm.errors import MllmError
from mllm.inference.generation import eval_mode, generation_config, without_end
from mllm.inference.prompt import Prompt, room_for_answer
from mllm.inference.text_stream import decode_answer
from mllm.training.callbacks import append_log

LONGEST_ANSWER = 64

logger = logging.getLogger(__name__)


class SampleAnswers(TrainerCallback):
    """Every so many steps the model answers one validation row, greedily: to log.jsonl, and to the console.

    Args:
        examples: The rows; each is answered in its turn.
        collate: Makes a padded batch of one.
        every: Steps between two answers.
        all_ranks: Whether all ranks have to generate together, as they must where weights are sharded.
    """

    def __init__(self, examples: Examples, collate: PaddingCollator, *, every: int, all_ranks: bool):
        self.examples = examples
        self.collate = collate
        self.every = every
        self.all_ranks = all_ranks

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Answer a row, if it is time."""
        if state.global_step % self.every or not (state.is_world_process_zero or self.all_ranks):
            return
        number = state.global_step // self.every - 1
        sample = self.sample(model, number)
        if sample is None or not state.is_world_process_zero:
            return
        append_log(args.output_dir, {"step": state.global_step, "sample": sample})
        text = "step {}, {id}\n  question:  {question}\n  reference: {reference}\n  answer:    {answer}"
        shown = text.format(state.global_step, **sample)
        if args.disable_tqdm:
            logger.info(shown)
        else:
            tqdm.write(shown)

    def sample(self, model: PreTrainedModel | PeftModel, number: int) -> dict[str, str] | None:
        """A row's last question, the row's own answer to it and the model's; None where the row cannot be asked.

        Args:
            model: Not wrapped for several ranks.
            number: Which row, counted on from the beginning behind the last.
        """
        example = self.examples[number % len(self.examples)]
        if isinstance(example, Pair):
            example = example.sides[0]  # with the chosen answer
        if not isinstance(example, Example) or (cut := last_answer(example)) is None:
            return None
        start, end = cut
        tokenizer = self.collate.processor.tokenizer
        asked = replace(example, input_ids=example.input_ids[:start], labels=example.labels[:start], loss_weights=None)
        try:
            answer = self._answer(model, asked)
        except MllmError as error:  # a damaged file, or no room: worth a line, and no reason to stop
            answer = f"({error.found})"
        return {
            "id": example.row.id,
            "question": _last_question(example),
            "reference": decode_answer(tokenizer, example.input_ids[start:end].tolist()),
            "answer": answer,
        }

    def _answer(self, model: PreTrainedModel | PeftModel, asked: Example) -> str:
        prompt = Prompt(asked.input_ids.tolist())
        room = room_for_answer(model, prompt, max_new_tokens=LONGEST_ANSWER)
        config = generation_config(model, max_new_tokens=room, temperature=0.0)
        batch = self.collate([asked])
        inputs = {name: value.to(model.device) for name, value in batch.items() if name not in ("labels", "sources")}
        with eval_mode(model), torch.no_grad():
            generated = model.generate(**inputs, generation_config=config)
        tokens = generated[0, inputs["input_ids"].shape[1] :].tolist()
        return decode_answer(self.collate.processor.tokenizer, without_end(tokens, config))


def last_answer(example: Example) -> tuple[int, int] | None:
    """Where the answer that ends a conversation begins and ends among its tokens; None if it does not end with one.

    Example: labels [-100, 5, -100, 7, 8] give (3, 5).
    """
    if example.row.messages[-1]["role"] != "assistant":
        return None
    is_learned = example.labels != IGNORED
    end = int(np.flatnonzero(is_learned)[-1]) + 1
    before = np.flatnonzero(~is_learned[:end])
    return (int(before[-1]) + 1, end) if len(before) else None


def _last_question(example: Example) -> str:
    asked: list[dict[str, Any]] = [message for message in example.row.messages if message["role"] == "user"]
    content = asked[-1]["content"] if asked else ""
    if isinstance(content, str):
        return content
    return " ".join(item["text"] if item["type"] == "text" else f"<{item['type']}>" for item in content)
