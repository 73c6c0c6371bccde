"""How many tokens conversations have, many at a time and without their ids: what packing and bucketing need to know.

`ChatEncoder.encode` keeps account of where each token stands in the text. Here the tokenizer gets many texts at once
and only counts. Conversations that are not plain (control tokens among the words) are encoded in the ordinary way, and
so are all of a stock processor: there a text may share tokens with what stands around a medium.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mllm.errors import RowError
from mllm.processing import MllmProcessor, TrainingProcessor
from mllm.processing.chat import ChatEncoder
from mllm.processing.control import control_tokens
from mllm.processing.messages import assistant_weights, plain_messages, words_of
from mllm.processing.stock import StockProcessor
from mllm.sizes import MediaSize, kind_of_size


class Chat(NamedTuple):
    """A conversation: its messages, the sizes of its media, and its name in errors."""

    messages: Sequence[dict[str, Any]]
    media_sizes: Sequence[MediaSize] = ()
    where: str = "the conversation"


class ChatLengths:
    """Count tokens under one processor.

    Args:
        processor: Its `encode_chat` is the measure.
    """

    def __init__(self, processor: TrainingProcessor):
        self.processor = processor
        self._encoder: ChatEncoder = processor.chat_encoder()
        self._kinds = tuple(processor.media_kinds) or ("image",)
        control = control_tokens(processor.tokenizer, *processor.media_tokens, processor.end_of_turn_token)
        self._first_letters = tuple({token[0] for token in control if len(token) > 1})

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
        if isinstance(self.processor, StockProcessor):
            return None
        try:
            turns, kinds = plain_messages(chat.messages, where=chat.where, kinds=self._kinds)
            if kinds != [kind_of_size(size) for size in chat.media_sizes]:
                return None
            if any(map(self._may_be_control, words_of(turns))):
                return None
            text, spans = self._encoder.render(turns, where=chat.where)
            if any(message.get("loss") is not None for message in chat.messages):
                assistant_weights(chat.messages, num_spans=len(spans), where=chat.where)
        except RowError:
            return None
        return text

    def _may_be_control(self, text: str) -> bool:
        """The pattern is slow; nearly every text lacks even the first letters of control tokens."""
        return any(letter in text for letter in self._first_letters) and bool(
            self._encoder.control_pattern.search(text)
        )

    def _adds_special(self, text: str) -> bool:
        """As `ChatEncoder` has it: the tokenizer adds its BOS unless the template wrote one."""
        bos = self._encoder.tokenizer.bos_token
        return bos is None or not text.startswith(bos)
