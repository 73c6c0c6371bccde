"""Messages to text by a chat template, many of them fast.

A template is rendered once for all conversations of one shape: the same roles, the same order of texts and media, the
same blanks around the texts. It gets a stand-in for each text, and where the stand-ins come out, the words are put in.

That is exact for a template that does no more with a text than to take blanks off its ends, to join it with others, or
to leave it out; of our own templates that is known (and tested). Any other is rendered for every conversation.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mllm.errors import OptionError, RowError
from mllm.processing.templates import TEMPLATES, named_template

REMEMBERED_SHAPES = 10_000
# Private-use characters around a text's number. Not blanks, so that a template trims around them as around words.
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")

# transformers keeps one tracker of generation blocks for all who use a template, and refuses a second user meanwhile.
_RENDERING = threading.Lock()

Spans = list[tuple[int, int]]
_Items = tuple[tuple[tuple[str, str], ...], ...]
_Key = tuple[tuple[str, str | _Items], ...]


@dataclass(frozen=True, slots=True)
class _Shape:
    """A rendered template.

    Args:
        literals: What stands before, between and behind the texts.
        texts: The numbers of the texts that stand between them.
        spans: What the assistant says: each end is a literal's number and a character of it.
    """

    literals: tuple[str, ...]
    texts: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    def filled(self, words: list[str]) -> tuple[str, Spans]:
        parts, starts, length = [self.literals[0]], [0], len(self.literals[0])
        for number, literal in zip(self.texts, self.literals[1:], strict=True):
            parts += (words[number], literal)
            length += len(words[number])
            starts.append(length)
            length += len(literal)
        spans = [(starts[first] + start, starts[last] + end) for (first, start), (last, end) in self.spans]
        return "".join(parts), spans


class TemplateRenderer:
    """Render conversations under one template.

    Args:
        chat_template: Text of a template with generation blocks.
        special_tokens: What the template may write, by name.
        is_opaque: Whether the template looks at no text's words; see `treats_texts_as_opaque`.
    """

    def __init__(self, chat_template: str, special_tokens: Mapping[str, Any], *, is_opaque: bool):
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens)
        self.is_opaque = is_opaque
        self._shapes: dict[tuple[_Key, bool], _Shape | None] = {}

    def __call__(
        self, turns: list[dict[str, Any]], *, add_generation_prompt: bool = False, where: str
    ) -> tuple[str, Spans]:
        """The template's output, and which characters of it the assistant says.

        Args:
            turns: Messages as `plain_messages` gives them.
            add_generation_prompt: Whether to end with the template's opening of an answer.
            where: Names the row in errors.

        Raises:
            RowError: The template refuses the messages.
        """
        if self.is_opaque:
            turns_key, words = _taken_apart(turns)
            shape = self._shape(turns_key, add_generation_prompt)
            if shape is not None:
                return shape.filled(words)
        try:
            return self._render(turns, add_generation_prompt)
        except TemplateError as error:
            raise RowError(
                f"{where}: messages that the chat template refuses ({error.message})",
                expected="roles in an order that the template has a place for",
                do="mend the messages, or choose another chat template",
            ) from error

    def _shape(self, turns_key: _Key, add_generation_prompt: bool) -> _Shape | None:
        """The template's output for stand-ins; None where the template refuses this order of roles."""
        key = (turns_key, add_generation_prompt)
        if key not in self._shapes:
            if len(self._shapes) >= REMEMBERED_SHAPES:
                self._shapes.clear()
            turns = [
                {"role": role, "content": content if isinstance(content, str) else list(map(dict, content))}
                for role, content in turns_key
            ]
            try:
                self._shapes[key] = _shape_of(*self._render(turns, add_generation_prompt))
            except TemplateError:
                self._shapes[key] = None
        return self._shapes[key]

    def _render(self, turns: list[dict[str, Any]], add_generation_prompt: bool) -> tuple[str, Spans]:
        with _RENDERING:
            texts, spans = render_jinja_template(
                [turns],
                chat_template=self.chat_template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        return texts[0], spans[0]


def treats_texts_as_opaque(
    tokenizer: PreTrainedTokenizerBase, chat_template: str, *, placeholders: Mapping[str, str]
) -> bool:
    """Whether a template is one of ours, which are known to look at no text's words."""
    for name in TEMPLATES:
        try:
            template = named_template(tokenizer, name, placeholders=placeholders)
        except OptionError:
            continue
        if template.text == chat_template:
            return True
    return False


def _shape_of(text: str, spans: Sequence[tuple[int, int]]) -> _Shape:
    pieces = _STAND_IN.split(text)
    starts = [0, *(found.end() for found in _STAND_IN.finditer(text))]

    def place(character: int) -> tuple[int, int]:
        # A span may end behind a literal, where a stand-in starts, but never inside of one.
        number = max(number for number, start in enumerate(starts) if start <= character)
        return number, character - starts[number]

    return _Shape(
        tuple(pieces[::2]), tuple(map(int, pieces[1::2])), tuple((place(start), place(end)) for start, end in spans)
    )


def _taken_apart(turns: list[dict[str, Any]]) -> tuple[_Key, list[str]]:
    """The turns with stand-ins, in a form that can be looked up, and the words that the stand-ins are for."""
    texts: list[str] = []

    def stand_in(text: str) -> str:
        words = text.strip()
        if not words:
            return text
        texts.append(words)
        start = text.index(words[0])
        return f"{text[:start]}\ue000{len(texts) - 1}\ue001{text[start + len(words) :]}"

    key: list[tuple[str, str | _Items]] = []
    for turn in turns:
        content = turn["content"]
        if isinstance(content, str):
            key.append((turn["role"], stand_in(content)))
        else:
            key.append((turn["role"], tuple(_frozen(item, stand_in) for item in content)))
    return tuple(key), texts


def _frozen(item: dict[str, str], stand_in: Callable[[str], str]) -> tuple[tuple[str, str], ...]:
    if item["type"] == "text":
        return (("type", "text"), ("text", stand_in(item["text"])))
    return (("type", item["type"]),)
