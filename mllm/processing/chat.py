"""Messages to token ids and loss weights. This is the only place where text becomes ids.

The template is rendered (`rendering.py`); its `{% generation %}` blocks say what the assistant speaks. The text is
encoded in one call, and tokens inside a block get the message's weight. A control token in somebody's words is
cut in two beforehand and the text is encoded in pieces, so that words stay words.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mllm.errors import OptionError, RowError
from mllm.processing.control import control_pattern, control_tokens, cut_control_tokens
from mllm.processing.messages import assistant_weights, plain_messages, rewritten, with_lists, words_of
from mllm.processing.rendering import TemplateRenderer, treats_texts_as_opaque

# Unicode noncharacters, "intended for internal use": a cut is marked by the first that nobody's words contain.
CUT_MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


class MediaSpan(NamedTuple):
    """Where the placeholders of one media item stand in `input_ids`."""

    kind: str
    start: int
    length: int


class Placeholder(NamedTuple):
    """How a kind of media stands in text.

    Args:
        written: The token that a template writes for an item.
        repeated: The token that the model puts feature vectors in place of; often the same.
    """

    written: str
    repeated: str


class Expansion(NamedTuple):
    """What one media item becomes in the text, as its size decides.

    Args:
        kind: Of the item.
        text: What the written token is replaced by, with every run of the repeated token as a single one.
        runs: How long each of these runs is.
    """

    kind: str
    text: str
    runs: tuple[int, ...]


class EncodedChat(NamedTuple):
    """A conversation as the model reads it; ids and weights have the same length, media are in order of appearance."""

    input_ids: list[int]
    loss_weights: list[float]
    media: list[MediaSpan]


class ChatEncoder:
    """Encode conversations under one tokenizer and one template.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library ("fast").
        chat_template: Text of a template with generation blocks.
        end_of_turn: The token that ends an answer; None while it is not known yet.
        placeholders: What stands for media of each kind that the model reads.
        lists_content: Whether the template wants every content as a list of items.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str,
        end_of_turn: str | None,
        placeholders: Mapping[str, Placeholder] | None = None,
        lists_content: bool = False,
    ):
        if not tokenizer.is_fast:
            raise OptionError(
                f"the tokenizer {type(tokenizer).__name__}",
                expected="a fast tokenizer, which reports where in the text each token stands",
                do="use a language model whose checkpoint holds a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.num_tokens = len(tokenizer)
        self.chat_template = chat_template
        self.placeholders = dict(placeholders or {})
        self.lists_content = lists_content
        repeated = {kind: token.repeated for kind, token in self.placeholders.items()}
        self.placeholder_ids = frozenset(map(tokenizer.convert_tokens_to_ids, repeated.values()))
        self.image_token_id = tokenizer.convert_tokens_to_ids(repeated["image"]) if "image" in repeated else None
        media_tokens = [token for pair in self.placeholders.values() for token in pair]
        self.control_pattern = control_pattern(control_tokens(tokenizer, *media_tokens, end_of_turn))
        is_opaque = treats_texts_as_opaque(tokenizer, chat_template, placeholders=repeated)
        self.render = TemplateRenderer(chat_template, tokenizer.special_tokens_map, is_opaque=is_opaque)
        self.newline_ids = tokenizer.backend_tokenizer.encode("\n", add_special_tokens=False).ids

    def belongs_to(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> bool:
        """Whether this encoder was made for this template and this state of the tokenizer."""
        return (
            tokenizer is self.tokenizer and len(tokenizer) == self.num_tokens and chat_template == self.chat_template
        )

    def __deepcopy__(self, memo: dict) -> "ChatEncoder":
        return self  # never changed once made; a processor copies itself to be saved

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        media: Sequence[Expansion] = (),
        add_generation_prompt: bool = False,
        where: str = "the conversation",
    ) -> EncodedChat:
        """Render, encode, weigh, expand.

        Args:
            messages: `role`, `content` (a string or a list of text and media items), and for the assistant's an
                optional `loss` (a bool or a weight).
            media: What each media item becomes, in order of appearance.
            add_generation_prompt: Whether to end with the template's opening of an answer.
            where: Names the row in errors.

        Raises:
            RowError: A message is malformed, images and placeholders disagree, or the template refuses the messages.
        """
        turns, kinds = plain_messages(messages, where=where, kinds=tuple(self.placeholders) or ("image",))
        _check_kinds(kinds, [item.kind for item in media], where)
        if self.lists_content:
            turns = with_lists(turns)
        mark = self._choose_mark(list(words_of(turns)), where)
        if mark is not None:
            turns = rewritten(turns, lambda text: cut_control_tokens(text, self.control_pattern, mark))
        text, spans = self.render(turns, add_generation_prompt=add_generation_prompt, where=where)
        if any(item.text != self.placeholders[item.kind].written for item in media):
            text, spans = self._replace_written(text, spans, media, where)
        weights = assistant_weights(messages, num_spans=len(spans), where=where)
        ids, starts, ends = self._tokenize(text, mark)
        loss_weights = [0.0] * len(ids)
        for (start, end), weight in zip(spans, weights, strict=True):
            first, behind = bisect_right(ends, start), bisect_left(starts, end)
            loss_weights[first:behind] = [weight] * (behind - first)
        return self._expand(ids, loss_weights, [(item.kind, item.runs) for item in media], where)

    def _choose_mark(self, words: list[str], where: str) -> str | None:
        """The mark to cut control tokens with, None where nobody's words hold one."""
        if not any(self.control_pattern.search(text) for text in words):
            return None
        for mark in CUT_MARKS:
            if not any(mark in text for text in words):
                return mark
        raise RowError(
            f"{where}: a control token beside all {len(CUT_MARKS)} Unicode noncharacters U+FDD0 to U+FDEF",
            expected="text that leaves at least one of them unused",
            do="drop the row, or take these characters out",
        )

    def _tokenize(self, text: str, mark: str | None) -> tuple[list[int], list[int], list[int]]:
        """Ids, and the characters of `text` at which each token starts and ends."""
        first, *others = [text] if mark is None else text.split(mark)
        # As stock processors do: the tokenizer adds its BOS unless the template wrote one.
        bos = self.tokenizer.bos_token
        add_special_tokens = bos is None or not text.startswith(bos)
        encoding = self.backend().encode(first, add_special_tokens=add_special_tokens)
        ids, offsets, position = encoding.ids, encoding.offsets, len(first)
        for piece in others:
            position += 1  # the mark
            piece_ids, piece_offsets = self._continue(piece)
            ids += piece_ids
            offsets += [(start + position, end + position) for start, end in piece_offsets]
            position += len(piece)
        return ids, [start for start, _ in offsets], [end for _, end in offsets]

    def _continue(self, piece: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode the text behind a cut, with a newline before it that is taken off again.

        SentencePiece puts a blank at the start of a text; stock `encode_marked_chat` avoids it in the same way.
        """
        backend = self.backend()
        encoding = backend.encode("\n" + piece, add_special_tokens=False)
        skipped = len(self.newline_ids)
        if encoding.ids[:skipped] == self.newline_ids:
            return encoding.ids[skipped:], [(start - 1, end - 1) for start, end in encoding.offsets[skipped:]]
        encoding = backend.encode(piece, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def backend(self) -> Tokenizer:
        """The tokenizer without the padding or truncation that an earlier call of its wrapper may have left set."""
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return backend

    def _replace_written(
        self, text: str, spans: list[tuple[int, int]], media: Sequence[Expansion], where: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text with each media item's own text in place of the token that the template wrote for it.

        Nobody's words can be meant: in them the written tokens are cut.
        """
        kinds = {token.written: kind for kind, token in self.placeholders.items()}
        pieces = re.split(f"({'|'.join(map(re.escape, kinds))})", text)
        written = [kinds[token] for token in pieces[1::2]]
        if written != [item.kind for item in media]:
            raise _placeholders_differ(written, [item.kind for item in media], where)
        # Where text is replaced, and by how much it grows there.
        place, growth, moved = 0, 0, [(0, 0)]
        for number, item in enumerate(media):
            place += len(pieces[2 * number]) + len(pieces[2 * number + 1])
            growth += len(item.text) - len(pieces[2 * number + 1])
            moved.append((place, growth))
            pieces[2 * number + 1] = item.text

        def new_place(old: int) -> int:
            return old + moved[bisect_right(moved, (old, len(text) * 1000)) - 1][1]

        return "".join(pieces), [(new_place(start), new_place(end)) for start, end in spans]

    def _expand(
        self, ids: list[int], loss_weights: list[float], media: Sequence[tuple[str, tuple[int, ...]]], where: str
    ) -> EncodedChat:
        """Repeat each placeholder as often as its media item has tokens; a placeholder is never trained on."""
        found = [index for index, token in enumerate(ids) if token in self.placeholder_ids]
        if len(found) != sum(len(runs) for _, runs in media):
            raise _placeholders_differ(["image"] * len(found), [kind for kind, runs in media for _ in runs], where)
        expanded_ids: list[int] = []
        expanded_weights: list[float] = []
        spans = []
        done = 0
        places = iter(found)
        for kind, runs in media:
            start = None
            for length in runs:
                index = next(places)
                expanded_ids += ids[done:index]
                expanded_weights += loss_weights[done:index]
                start = len(expanded_ids) if start is None else start
                expanded_ids += [ids[index]] * length
                expanded_weights += [0.0] * length
                done = index + 1
            start = len(expanded_ids) if start is None else start
            spans.append(MediaSpan(kind, start, len(expanded_ids) - start))
        return EncodedChat(expanded_ids + ids[done:], expanded_weights + loss_weights[done:], spans)


def _check_kinds(found: list[str], given: list[str], where: str) -> None:
    if found == given:
        return
    kind = next((kind for kind in (*found, *given) if found.count(kind) != given.count(kind)), None)
    what = (
        f"{found.count(kind)} {kind} items in the messages, and {given.count(kind)} {kind}s"
        if kind
        else f"media items {', '.join(found)} in the messages, and media {', '.join(given)}"
    )
    kind = kind or found[0]
    raise RowError(
        f"{where}: {what}",
        expected=f"one {kind} for each {{'type': {kind!r}}} content item, in order",
        do=f"add what is missing: the {kind} to the row, or the content item to a message",
    )


def _placeholders_differ(found: list[str], given: list[str], where: str) -> RowError:
    kind = (*given, *found)[0]
    return RowError(
        f"{where}: {len(found)} {kind} placeholders from the chat template for {len(given)} {kind}s",
        expected=f"one placeholder for each {kind} item",
        do=f"choose a chat template that renders the {kind}s of every message",
    )


def end_of_turn_ids(processor: ProcessorMixin) -> list[int]:
    """Ids at which generation stops: the template's end of turn, and the tokenizer's end of sequence if it differs."""
    tokenizer = processor.tokenizer
    end_of_turn = tokenizer.convert_tokens_to_ids(processor.end_of_turn_token)
    return list(dict.fromkeys(token for token in (end_of_turn, tokenizer.eos_token_id) if token is not None))


def control_token_ids(processor: ProcessorMixin) -> list[int]:
    """Ids that must never be generated: every control token and placeholder but those that end a turn, ascending."""
    tokens = control_tokens(processor.tokenizer, *processor.media_tokens)
    ids = set(processor.tokenizer.convert_tokens_to_ids(tokens))
    return sorted(ids - set(end_of_turn_ids(processor)))
