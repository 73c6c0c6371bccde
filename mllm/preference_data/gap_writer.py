"""Write an answer with a model, token by token, where only the gaps are the model's own words.

Every token of a row is decided here, from the model's candidates: outside of gaps it is the next of the kept words,
inside the likeliest that belongs to a gap. So one call of `generate` completes a batch, with one reading of the media.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from string import whitespace

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from mllm.inference.text_stream import UNFINISHED, decode_answer
from mllm.preference_data.words import ATTRIBUTES, COLOURS, OPENERS

NUM_CANDIDATES = 64
"""Among how many likeliest tokens the first of a gap is looked for."""
READINESS = 0.2
"""A gap ends where what follows it is at least this many times as likely as the likeliest token: a model that would go
on with a comma may as well say "and"."""
_ATTRIBUTES = ATTRIBUTES | COLOURS
_IN_WORDS = frozenset("-'’" + UNFINISHED)


@dataclass(frozen=True, slots=True)
class Gap:
    """A phrase to be written anew, and what follows it.

    Args:
        then: Ids of the kept words up to the next gap or the end; none where the answer ends with the gap.
        is_apart: Whether a blank has to come first (True), must not (False), or may (None).
        own: Words (lower case) and signs of the phrase; another sign ends the gap, and so does another of `OPENERS`.
        length: Tokens after which it ends where the next word begins.
        most: Tokens after which it ends anyway.
    """

    then: Sequence[int]
    is_apart: bool | None
    own: frozenset[str]
    length: int
    most: int


class GapWriter:
    """Decides the tokens of one answer.

    A gap ends where the model may go on with the first kept word behind it, or would end its turn, begin a new line or
    say something new: with a sign, or a word such as "and", that the phrase did not have. It also ends when it gets
    long. It is empty only where none of the model's candidates is a word.

    Args:
        gaps: Of the answer, in order.
        last_id: The token in front of the first gap.
        tokenizer: Of the model.
        end_ids: Tokens that end a turn.
    """

    def __init__(
        self, gaps: Sequence[Gap], *, last_id: int, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]
    ):
        self.gaps, self.tokenizer, self.end_ids = gaps, tokenizer, end_ids
        self.words: list[str] = []
        self._forced: list[int] = []
        self._written: list[int] = []
        self._last, self._before = last_id, last_id

    @property
    def most_tokens(self) -> int:
        """How many it decides at most, the end of the turn included."""
        return sum(gap.most + len(gap.then) for gap in self.gaps) + 1

    def next_token(self, candidates: Sequence[int], *, num_likely: int = 1) -> int:
        """The next token.

        Args:
            candidates: The model's likeliest ones, best first.
            num_likely: How many of them are nearly as likely as the first.
        """
        self._last = self._decide(candidates, candidates[:num_likely])
        return self._last

    def _decide(self, candidates: Sequence[int], likely: Sequence[int]) -> int:
        if self._forced:
            return self._forced.pop(0)
        if len(self.words) == len(self.gaps):
            return self.end_ids[0]
        gap, text = self.gaps[len(self.words)], self._gap_text()
        if len(self._written) >= gap.most or (text.strip() and self._is_end(likely, gap)):
            return self._close(gap, text)
        token = candidates[0] if text.strip() else self._first(candidates, gap, has_blank=bool(text))
        if not self._written:
            self._before = self._last
        self._written.append(token)
        return token

    def _first(self, candidates: Sequence[int], gap: Gap, *, has_blank: bool) -> int:
        """The likeliest token that can begin a gap; where none can, the likeliest that is (part of) a word."""
        speakable = [token for token in candidates if token not in self.end_ids]
        fitting = [token for token in speakable if self._begins(token, gap, has_blank=has_blank)]
        words = (token for token in speakable if self._text_of(token).lstrip()[:1].isalnum())
        return fitting[0] if fitting else next(words, speakable[0])

    def _begins(self, token: int, gap: Gap, *, has_blank: bool) -> bool:
        text = self._text_of(token)
        word = text.lstrip()
        if not text or "\n" in text or token in gap.then[:1]:
            return False
        if not word:  # a blank of its own, in front of a number, say
            return not has_blank and gap.is_apart is not False
        is_apart = has_blank or text[0] in whitespace
        fits = gap.is_apart is None or is_apart == gap.is_apart
        return fits and not (has_blank and text[0] in whitespace) and _belongs(word.lower(), gap)

    def _is_end(self, likely: Sequence[int], gap: Gap) -> bool:
        """Whether the model, which would write the first of these tokens, has come to the end of a gap."""
        follows = gap.then[:1] or self.end_ids
        if likely[0] in self.end_ids or not set(follows).isdisjoint(likely):
            return True
        text = self._text_of(likely[0])
        word = text.strip().lower()
        if "\n" in text:
            return True
        if word in OPENERS and self._gap_text().split()[-1].lower() in _ATTRIBUTES:  # black and white
            return False
        if word and not _belongs(word, gap):
            return True
        return len(self._written) >= gap.length and text[:1] in whitespace

    def _close(self, gap: Gap, text: str) -> int:
        self.words.append(text.strip())
        self._written = []
        self._forced = list(gap.then) or [self.end_ids[0]]
        return self._forced.pop(0)

    def _gap_text(self) -> str:
        return self._text_after(self._before, self._written) if self._written else ""

    def _text_of(self, token: int) -> str:
        return self._text_after(self._last, [token])

    def _text_after(self, before: int, tokens: list[int]) -> str:
        """What tokens add to the text behind another one: a tokenizer may drop a blank at the beginning of a text."""
        head, whole = decode_answer(self.tokenizer, [before]), decode_answer(self.tokenizer, [before, *tokens])
        return whole[len(head) :] if whole.startswith(head) else UNFINISHED


class GapWriting(LogitsProcessor):
    """Makes `generate` write what the writers of its rows decide."""

    def __init__(self, writers: Sequence[GapWriter]):
        self.writers = writers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best = scores.topk(min(NUM_CANDIDATES, scores.shape[-1]), dim=-1)
        num_likely = (best.values >= best.values[:, :1] + log(READINESS)).sum(-1)
        tokens = [
            writer.next_token(candidates, num_likely=number)
            for writer, candidates, number in zip(
                self.writers, best.indices.tolist(), num_likely.tolist(), strict=True
            )
        ]
        decided = torch.full_like(scores, -torch.inf)
        decided[torch.arange(len(tokens), device=scores.device), torch.tensor(tokens, device=scores.device)] = 0.0
        return decided


def _belongs(word: str, gap: Gap) -> bool:
    """Whether the first token of a word, in lower case, may stand in a gap."""
    if word[0].isalnum():
        return word in gap.own or word not in OPENERS
    return word[0] in gap.own or word[0] in _IN_WORDS
