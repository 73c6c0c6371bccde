"""How many tokens conversations have, many at a time and without their ids: what packing and bucketing need to know.

`ChatEncoder.encode` renders a template for every conversation, and keeps account of where each token stands in the
text. Here a template is rendered once for all conversations of one shape: the same roles, the same order of texts and
images, the same blanks around the texts. It gets a stand-in for each text, and where the stand-ins come out, the words
are put in. The tokenizer gets many texts at once and only counts.

That is exact for a template that does no more with a text than to take blanks off its ends, to join it with others, or
to leave it out; of our own templates that is known (and tested). Under any other template, and for conversations that
are not plain (control tokens among the words), every conversation is encoded in the ordinary way.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mllm.errors import OptionError, RowError
from mllm.processing import MllmProcessor, TrainingProcessor
from mllm.processing.chat import ChatEncoder
from mllm.processing.control import control_tokens
from mllm.processing.messages import assistant_weights, plain_messages, words_of
from mllm.processing.stock import StockProcessor
from mllm.processing.templates import TEMPLATES, named_template
from mllm.sizes import MediaSize, kind_of_size

REMEMBERED_SHAPES = 10_000
# Private-use characters around a text's number. Not blanks, so that a template trims around them as around words.
_STAND_IN = re.compile("\ue000([0-9]+)\ue001")


class Chat(NamedTuple):
    """A conversation: its messages, the sizes of its media, and its name in errors."""

    messages: Sequence[dict[str, Any]]
    media_sizes: Sequence[MediaSize] = ()
    where: str = "the conversation"


@dataclass(frozen=True, slots=True)
class _Shape:
    """A rendered template: literal pieces, and between them the numbers of the texts that stand there."""

    literals: tuple[str, ...]
    texts: tuple[int, ...]
    num_spans: int

    def filled(self, texts: list[str]) -> str:
        parts = [self.literals[0]]
        for number, literal in zip(self.texts, self.literals[1:], strict=True):
            parts += (texts[number], literal)
        return "".join(parts)


class ChatLengths:
    """Count tokens under one processor.

    Args:
        processor: Its `encode_chat` is the measure.
    """

    def __init__(self, processor: TrainingProcessor):
        self.processor = processor
        self._encoder: ChatEncoder = processor.chat_encoder()
        self._is_ours = treats_texts_as_opaque(processor)
        self._kinds = tuple(processor.media_kinds) or ("image",)
        control = control_tokens(processor.tokenizer, *processor.media_tokens, processor.end_of_turn_token)
        self._first_letters = tuple({token[0] for token in control if len(token) > 1})
        self._shapes: dict[_Key, _Shape | None] = {}

    def __call__(self, chats: Sequence[Chat]) -> list[int]:
        """`len(encode_chat(...).input_ids)` of each conversation; 0 where `encode_chat` refuses it with a RowError."""
        texts = [self._rendered(chat) for chat in chats]
        lengths = self._tokenized(chats, texts)
        return [self._encoded(chat) if length is None else length for chat, length in zip(chats, lengths, strict=True)]

    def _encoded(self, chat: Chat) -> int:
        try:
            encoded = self.processor.encode_chat(chat.messages, media_sizes=chat.media_sizes, where=chat.where)
        except RowError:
            return 0
        return len(encoded.input_ids)

    def _tokenized(self, chats: Sequence[Chat], texts: list[str | None]) -> list[int | None]:
        """Lengths of rendered texts; None where there is no text, or where placeholders and media disagree."""
        lengths: list[int | None] = [None] * len(texts)
        backend, placeholders = self._encoder.backend(), self._encoder.placeholder_ids
        for adds in (False, True):
            numbers = [n for n, text in enumerate(texts) if text is not None and self._adds_special(text) is adds]
            batch = backend.encode_batch_fast([str(texts[n]) for n in numbers], add_special_tokens=adds)
            for number, encoding in zip(numbers, batch, strict=True):
                sizes = chats[number].media_sizes
                if sum(map(encoding.ids.count, placeholders)) == len(sizes):
                    media = self._media_tokens(sizes)
                    lengths[number] = None if media is None else len(encoding) - len(sizes) + media
        return lengths

    def _media_tokens(self, sizes: Sequence[MediaSize]) -> int | None:
        """The tokens that media become; None where one is refused, or has words of its own between them."""
        assert isinstance(self.processor, MllmProcessor)  # under a stock one nothing is rendered
        try:
            items = [self.processor.expansion(size) for size in sizes]
        except RowError:
            return None
        if any(item.text != self.processor.placeholders[item.kind] for item in items):
            return None
        return sum(sum(item.runs) for item in items)

    def _rendered(self, chat: Chat) -> str | None:
        """The template's output for a conversation, None where only `encode` can say."""
        if not self._is_ours:
            return None
        try:
            turns, kinds = plain_messages(chat.messages, where=chat.where, kinds=self._kinds)
            if kinds != [kind_of_size(size) for size in chat.media_sizes]:
                return None
            if any(map(self._may_be_control, words_of(turns))):
                return None
            key, texts = _taken_apart(turns)
            if key not in self._shapes:
                if len(self._shapes) >= REMEMBERED_SHAPES:
                    self._shapes.clear()
                self._shapes[key] = self._render(key)
            shape = self._shapes[key]
            if shape is None:
                return None
            if any(message.get("loss") is not None for message in chat.messages):
                assistant_weights(chat.messages, num_spans=shape.num_spans, where=chat.where)
        except RowError:
            return None
        return shape.filled(texts)

    def _may_be_control(self, text: str) -> bool:
        """The pattern is slow; nearly every text lacks even the first letters of control tokens."""
        return any(letter in text for letter in self._first_letters) and bool(
            self._encoder.control_pattern.search(text)
        )

    def _render(self, key: "_Key") -> _Shape | None:
        """The template's output for stand-ins; None where the template refuses this order of roles."""
        turns = [
            {"role": role, "content": content if isinstance(content, str) else list(map(dict, content))}
            for role, content in key
        ]
        try:
            text, spans = self._encoder.render(turns, False, "the conversation")
        except RowError:
            return None
        pieces = _STAND_IN.split(text)
        return _Shape(tuple(pieces[::2]), tuple(map(int, pieces[1::2])), len(spans))

    def _adds_special(self, text: str) -> bool:
        """As `ChatEncoder` has it: the tokenizer adds its BOS unless the template wrote one."""
        bos = self._encoder.tokenizer.bos_token
        return bos is None or not text.startswith(bos)


_Items = tuple[tuple[tuple[str, str], ...], ...]
_Key = tuple[tuple[str, str | _Items], ...]


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


def treats_texts_as_opaque(processor: TrainingProcessor) -> bool:
    """Whether a processor's template is one of ours, which are known to look at no text's words.

    Under a stock processor a text may share tokens with what stands around a medium, so it is encoded as a whole.
    """
    if isinstance(processor, StockProcessor):
        return False
    for name in TEMPLATES:
        try:
            template = named_template(processor.tokenizer, name, placeholders=processor.placeholders)
        except OptionError:
            continue
        if template.text == processor.chat_template:
            return True
    return False
