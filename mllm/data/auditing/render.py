"""Rows as the model will read them: every token with its role, its weight in the loss and the medium it stands for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm.data.coordinates import move_row
from mllm.data.schema import Answer, MediaItem, PreferenceRow, Row
from mllm.errors import MllmError, RowError
from mllm.processing import TrainingProcessor
from mllm.processing.chat import EncodedChat
from mllm.processing.control import control_tokens

CUT_CHARACTER = "\ufffd"
"""What decoding half of a character gives."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is shown.

    Args:
        text: What it says; "" for media.
        ids: Its id; several where a character takes more than one token; of media, one for all its placeholders.
        count: How many tokens of the sequence it is.
        role: Of whose message it is a part, the template's words around that message included; "" if nobody's.
        weight: In the loss; 0.0 for what is only read.
        kind: "text", "control" for special tokens, or a kind of media.
        media: Which of the side's media it stands for; -1 for none.
    """

    text: str
    ids: tuple[int, ...] = ()
    count: int = 1
    role: str = ""
    weight: float = 0.0
    kind: str = "text"
    media: int = -1


@dataclass(frozen=True, slots=True)
class Side:
    """One conversation as it is read: a row has one, a preference two or three.

    Args:
        title: "" of a plain row; "chosen", "rejected" or "contrast".
        messages: With boxes moved to what is seen.
        media: In order of appearance.
        tokens: Without a processor, whole texts that stand for no ids.
        length: In tokens, placeholders included; 0 without a processor.
        num_learned: Tokens that the loss is computed on.
        problem: Why it cannot be encoded; "" if it can.
    """

    title: str
    messages: list[dict[str, Any]]
    media: tuple[MediaItem, ...]
    tokens: list[Token] = field(default_factory=list)
    length: int = 0
    num_learned: int = 0
    problem: str = ""


def render_row(row: Row, processor: TrainingProcessor | None = None) -> list[Side]:
    """All sides of a row, token by token where there is a processor; what cannot be encoded says why."""
    if processor is not None:
        try:
            row = move_row(row, processor.image_geometry)
        except MllmError as error:
            return [Side(title, messages, media, problem=error.found) for title, messages, media in sides_of(row)]
    return [_render_side(*side, processor, row.name) for side in sides_of(row)]


def encode_sides(row: Row, processor: TrainingProcessor) -> list[EncodedChat]:
    """Ids, weights and spans of all sides of a row.

    Raises:
        RowError: One of them cannot be encoded, or a box has no place in what is seen.
    """
    row = move_row(row, processor.image_geometry)
    return [_encode(messages, media, processor, row.name) for _, messages, media in sides_of(row)]


def sides_of(row: Row) -> Iterator[tuple[str, list[dict[str, Any]], tuple[MediaItem, ...]]]:
    """Title, messages and media of each conversation that a row makes the model read."""
    if not isinstance(row, PreferenceRow):
        yield "", row.messages, row.media
        return

    def answered(answer: Answer) -> list[dict[str, Any]]:
        return [*row.messages, {"role": "assistant", "content": answer.content}]

    for title, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        yield title, answered(answer), row.media if answer.media is None else answer.media
    if row.contrast is not None:
        yield "contrast", answered(row.chosen), row.contrast


def num_learned(chat: EncodedChat) -> int:
    """Tokens that the loss is computed on; the first token of a sequence is never predicted."""
    return sum(weight > 0 for weight in chat.loss_weights[1:])


def _render_side(
    title: str,
    messages: list[dict[str, Any]],
    media: tuple[MediaItem, ...],
    processor: TrainingProcessor | None,
    where: str,
) -> Side:
    if processor is None:
        return Side(title, messages, media, _plain_tokens(messages))
    try:
        chat = _encode(messages, media, processor, where)
    except RowError as error:
        return Side(title, messages, media, _plain_tokens(messages), problem=error.found)
    roles = _roles(chat, messages, media, processor)
    tokens = _tokens(chat, roles, processor)
    return Side(title, messages, media, tokens, len(chat.input_ids), num_learned(chat))


def _encode(
    messages: Sequence[dict[str, Any]], media: Sequence[MediaItem], processor: TrainingProcessor, where: str
) -> EncodedChat:
    return processor.encode_chat(messages, media_sizes=[item.size for item in media], where=where)


def _plain_tokens(messages: Sequence[dict[str, Any]]) -> list[Token]:
    """Texts and media without ids, for want of a tokenizer; each message begins a line, and says who speaks."""
    tokens, num_media = [], 0
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        tokens.append(Token(f"{chr(10) if number else ''}{role}: ", count=0, role=role, kind="control"))
        loss = message.get("loss")
        weight = float(1.0 if loss is None else loss) if role == "assistant" else 0.0
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item["type"] == "text":
                tokens.append(Token(item.get("text") or "", role=role, weight=weight))
                continue
            tokens.append(Token("", role=role, kind=item["type"], media=num_media))
            num_media += 1
    return tokens


def _roles(
    chat: EncodedChat, messages: Sequence[dict[str, Any]], media: Sequence[MediaItem], processor: TrainingProcessor
) -> list[str]:
    """Whose each token is: a message's are those by which the encoded conversation grows when the message is added.

    A template that rewrites what came before (a last turn without its end) is followed as far as both agree.
    """
    roles: list[str] = []
    num_media = 0
    for number, message in enumerate(messages[:-1], start=1):
        content = message["content"]
        num_media += 0 if isinstance(content, str) else sum(item["type"] != "text" for item in content)
        try:
            ids = _encode(messages[:number], media[:num_media], processor, "").input_ids
        except RowError:
            continue  # a template may refuse a conversation that ends here: its words go to the next message
        common = next((n for n, (a, b) in enumerate(zip(ids, chat.input_ids, strict=False)) if a != b), len(ids))
        roles += [message["role"]] * (min(common, len(chat.input_ids)) - len(roles))
    return roles + [messages[-1]["role"]] * (len(chat.input_ids) - len(roles))


def _tokens(chat: EncodedChat, roles: Sequence[str], processor: TrainingProcessor) -> list[Token]:
    """The sequence from left to right, each span of placeholders as one."""
    tokens: list[Token] = []
    done = 0
    for number, span in enumerate(chat.media):
        tokens += _text_tokens(chat, roles, processor, done, span.start)
        done = span.start + span.length
        ids = tuple(chat.input_ids[span.start : span.start + 1])
        tokens.append(Token("", ids, span.length, roles[min(span.start, len(roles) - 1)], 0.0, span.kind, number))
    return tokens + _text_tokens(chat, roles, processor, done, len(chat.input_ids))


def _text_tokens(
    chat: EncodedChat, roles: Sequence[str], processor: TrainingProcessor, start: int, end: int
) -> list[Token]:
    tokenizer = processor.tokenizer
    names = control_tokens(tokenizer, *processor.media_tokens, processor.end_of_turn_token)
    special = set(tokenizer.convert_tokens_to_ids(names))
    tokens: list[Token] = []
    first = start
    for last in range(start, end):
        ids = tuple(chat.input_ids[first : last + 1])
        is_control = ids[-1] in special
        # Decoders treat the first token of a text in their own way, so each is read behind the one before it.
        before = tokens[-1].ids if tokens else tuple(chat.input_ids[max(first - 1, 0) : first])
        text = _decode(tokenizer, [*before, *ids])[len(_decode(tokenizer, before)) :]
        # Part of a character: wait for the rest of it, which takes three more tokens at most.
        if text.endswith(CUT_CHARACTER) and len(ids) < 4 and last + 1 < end:
            continue
        kind = "control" if is_control else "text"
        tokens.append(Token(text, ids, len(ids), roles[last], chat.loss_weights[last], kind))
        first = last + 1
    return tokens


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
