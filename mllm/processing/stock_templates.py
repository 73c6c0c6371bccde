"""Chat templates to train stock checkpoints with: those of the Hub, with `{% generation %}` around what is learned.

Most published templates do not say what the assistant speaks. We have a template of our own for each family, and take
it only where it writes what the checkpoint's template writes, letter by letter, for a set of conversations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mllm.errors import OptionError
from mllm.processing.chat import ChatEncoder, Placeholder
from mllm.processing.messages import with_lists
from mllm.processing.template_check import check_template
from mllm.processing.templates import TEMPLATES, ChatTemplate, marks_generation, named_template

ANSWER = "No, there is none."


@dataclass(frozen=True)
class StockTemplate:
    """A published template, as it has to be for training.

    Args:
        answer: What it writes for an answer in a conversation, with `{}` for the words and `{eos}` for the end of
            sequence, where that is not what was published.
        published: What the published one writes there.
    """

    answer: str = ""
    published: str = ""


STOCK_TEMPLATES: dict[str, StockTemplate] = {
    "llava": StockTemplate(answer="ASSISTANT: {}{eos}", published="ASSISTANT: {} "),
    "llava_next_mistral": StockTemplate(answer=" {}{eos}", published=" {}<\\s> "),
    "llava_onevision": StockTemplate(
        answer="<|im_start|>assistant\n{}<|im_end|>", published="<|im_start|>assistant \n{}<|im_end|>"
    ),
    "qwen2_vl": StockTemplate(),
    "qwen3_vl": StockTemplate(),
    "smolvlm": StockTemplate(),
    "gemma3": StockTemplate(),
    "qwen2_audio": StockTemplate(),
}


def trainable_template(
    tokenizer: PreTrainedTokenizerBase,
    own: str | None,
    *,
    encoder: Callable[[str, str | None], ChatEncoder],
    placeholders: dict[str, Placeholder],
    choice: str | None = None,
) -> ChatTemplate:
    """The template to train a stock checkpoint with, tried out on its tokenizer.

    Args:
        tokenizer: The checkpoint's.
        own: The checkpoint's template.
        encoder: Makes an encoder of a template and its end of turn.
        placeholders: Tokens that stand for media, by kind.
        choice: A name of `STOCK_TEMPLATES` or `TEMPLATES`, or the text of a template; None to go by `own`.

    Raises:
        OptionError: The choice does not fit the tokenizer, or there is nothing to go by.
    """
    written = {kind: token.written for kind, token in placeholders.items()}
    candidates = dict(_templates(tokenizer, written))
    if choice is not None:
        template = candidates.get(choice) or _as_text(choice, tuple(candidates))
        return ChatTemplate(template.text, check_template(encoder(template.text, None), template.end_of_turn))
    problem = "it has none" if own is None else "it does not mark what the assistant says"
    if own is not None and marks_generation(own):
        try:
            return ChatTemplate(own, check_template(encoder(own, None), None))
        except OptionError as error:
            problem = error.found
    for name, template in candidates.items():
        if own is not None and _writes_the_same(tokenizer, name, template.text, own, tuple(placeholders)):
            return ChatTemplate(template.text, check_template(encoder(template.text, None), template.end_of_turn))
    raise OptionError(
        f"a chat template that cannot be trained with: {problem}, and none of ours writes what it writes",
        expected="{% generation %} around each answer and the token that ends it, or a template as published by "
        f"{', '.join(STOCK_TEMPLATES)}",
        do="set `chat_template` to one of these names, or mark the answers in the checkpoint's chat_template.jinja",
    )


def _templates(tokenizer: PreTrainedTokenizerBase, written: Mapping[str, str]) -> Iterator[tuple[str, ChatTemplate]]:
    for name in STOCK_TEMPLATES:
        text = resources.files("mllm.processing").joinpath(f"templates/stock/{name}.jinja").read_text(encoding="utf-8")
        yield name, ChatTemplate(text, end_of_turn=None)
    for name in TEMPLATES:
        try:
            yield name, named_template(tokenizer, name, placeholders=written)
        except OptionError:
            continue


def _as_text(choice: str, names: tuple[str, ...]) -> ChatTemplate:
    if not marks_generation(choice):
        raise OptionError(
            f"chat_template = {choice[:60]!r}",
            expected=f"one of {', '.join(names)}, or the text of a template with {{% generation %}} blocks",
            do="choose a name, or mark what the assistant says by {% generation %} ... {% endgeneration %}",
        )
    return ChatTemplate(choice, end_of_turn=None)


def _writes_the_same(
    tokenizer: PreTrainedTokenizerBase, name: str, text: str, own: str, kinds: tuple[str, ...]
) -> bool:
    """Whether a template of ours writes what the checkpoint's does, but for answers where a difference is declared."""
    difference = STOCK_TEMPLATES.get(name, StockTemplate())
    ours = difference.answer.format(ANSWER, eos=tokenizer.eos_token)
    theirs = difference.published.format(ANSWER)
    for messages, prompts in _probes(kinds):
        written = _rendered(tokenizer, text, messages, add_generation_prompt=prompts)
        if ours and written is not None:
            written = written.replace(ours, theirs)
        if written != _rendered(tokenizer, own, messages, add_generation_prompt=prompts):
            return False
    return True


def _probes(kinds: Sequence[str]) -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """Conversations with and without a system message, several turns and media, complete and as prompts."""
    system: dict[str, Any] = {"role": "system", "content": "Look closely."}
    question: dict[str, Any] = {"role": "user", "content": "Is there a 5?"}
    answer: dict[str, Any] = {"role": "assistant", "content": ANSWER}
    shown = [
        {"role": "user", "content": [*({"type": kind} for _ in range(count)), {"type": "text", "text": "And here?"}]}
        for kind in kinds
        for count in (1, 2)
    ]
    for first in (question, *shown):
        for begin in ([], [system]):
            yield with_lists([*begin, first]), True
            yield with_lists([*begin, first, answer]), False
            yield with_lists([*begin, first, answer, question]), True
            yield with_lists([*begin, first, answer, *shown[:1], answer]), False


def _rendered(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]], *, add_generation_prompt: bool
) -> str | None:
    """What a template writes; None where it refuses the messages."""
    try:
        texts, _ = render_jinja_template(
            [messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except TemplateError:
        return None
    return texts[0]
