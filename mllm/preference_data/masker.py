"""Find the phrases of an answer that say what is seen: by rules without any model, or by asking an endpoint."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from re import compile as pattern

from mllm.errors import OptionError, RowError
from mllm.preference_data.endpoint import Endpoint, Failure, Question
from mllm.preference_data.phrases import MASK, NO_PHRASE, Masked, Phrase, joined, words_of
from mllm.preference_data.replies import plain_reply
from mllm.preference_data.words import (
    ACTIONS,
    ANSWERS,
    ARTICLES,
    ATTRIBUTES,
    COLOURS,
    KEPT,
    NO_ADVERBS,
    NUMBERS,
    RELATIONS,
)

OBJECT, ATTRIBUTE, COLOUR, NUMBER = "object", "attribute", "colour", "number"
RELATION, ACTION, ANSWER = "relation", "action", "answer"
KINDS = (OBJECT, ATTRIBUTE, COLOUR, NUMBER, RELATION, ACTION, ANSWER)
"""What a phrase may name. The first four stand together in one phrase: two small red cups."""

MASK_PROMPT = (
    "Please mask any words of the segments related to the objects, attributes, and logical relationships of the input "
    "image in the following description by replacing them with [MASK]."
)
"""The paper's (appendix C)."""
KEEP_NOTE = "Keep every other word and sign as it is, and reply with the masked description alone."
"""Ours: a reply that changes other words cannot be used."""

_NOUN_LIKE = (OBJECT, ATTRIBUTE, COLOUR, NUMBER)
_CLASSES = ((NUMBERS, NUMBER), (COLOURS, COLOUR), (ACTIONS, ACTION), (ATTRIBUTES, ATTRIBUTE))
_LONGEST_RELATION = max(len(relation.split()) for relation in RELATIONS)
_SHORT_ANSWER = 3
_QUOTED = pattern(r'"([^"\n]+)"|“([^”\n]+)”')


@dataclass(frozen=True, slots=True)
class RuleMasker:
    """Masks English answers by closed word classes (`words.py`); whatever is in none of them counts as a thing.

    Example: "There is a red cup next to two dogs." becomes "There is [MASK] [MASK] ..." with the phrases "a red cup",
    "next to" and "two dogs", joined into one where `longest` allows.

    Args:
        kinds: Which of `KINDS` are masked.
        longest: Most words of a phrase. A relation or an action is left out where it would join its neighbours to a
            longer one; things with what is said of them may be longer.
        share: Share of an answer's phrases that is masked, at least one; which ones, a draw says.
        seed: Of the draws. An answer's draw depends on nothing but this and its words.
    """

    kinds: tuple[str, ...] = KINDS
    longest: int = 6
    share: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise OptionError(f"kinds = {unknown}", expected=f"some of {', '.join(KINDS)}", do="correct `kinds`")
        if not 0 < self.share <= 1 or self.longest < 1:
            raise OptionError(
                f"share = {self.share}, longest = {self.longest}",
                expected="a share above 0 and up to 1, and at least one word",
                do="correct them",
            )

    def mask(self, texts: Sequence[str]) -> Iterator[tuple[int, Masked]]:
        """Each text's index and what of it is masked, in order."""
        for index, text in enumerate(texts):
            phrases = self._drawn(self._found(text), text)
            yield index, Masked(text, phrases, reason="" if phrases else NO_PHRASE)

    def _found(self, text: str) -> tuple[Phrase, ...]:
        words = _labelled(text)
        things = _with_articles(
            words, joined([word for word in words if word.kind in self._wanted_things], text), text
        )
        phrases = self._with_relations(things, _runs(words, self._wanted_relations, text), text)
        if phrases or ANSWER not in self.kinds or len(_spoken(words, text)) > _SHORT_ANSWER:
            return phrases
        return joined([Phrase(word.start, word.end, ANSWER) for word in _spoken(words, text)], text)

    @property
    def _wanted_things(self) -> tuple[str, ...]:
        return tuple(kind for kind in (*_NOUN_LIKE, ANSWER) if kind in self.kinds)

    @property
    def _wanted_relations(self) -> tuple[str, ...]:
        return tuple(kind for kind in (RELATION, ACTION) if kind in self.kinds)

    def _with_relations(
        self, things: tuple[Phrase, ...], relations: Sequence[Phrase], text: str
    ) -> tuple[Phrase, ...]:
        """Add what relates things, one by one, where no phrase becomes longer than the longest."""
        phrases = things
        for relation in relations:
            more = joined([*phrases, relation], text)
            widened = next(phrase for phrase in more if phrase.start <= relation.start < phrase.end)
            if len(words_of(text[widened.start : widened.end])) <= self.longest:
                phrases = more
        return phrases

    def _drawn(self, phrases: tuple[Phrase, ...], text: str) -> tuple[Phrase, ...]:
        number = max(1, round(self.share * len(phrases)))
        if number >= len(phrases):
            return phrases
        return tuple(sorted(random.Random(f"{self.seed}/{text}").sample(phrases, number)))


class EndpointMasker:
    """Asks a language model behind an OpenAI-compatible endpoint to mask an answer, with the paper's prompt.

    A reply of no use (words changed, nothing masked out of anything) is asked for again, then counted.

    Args:
        endpoint: Where to ask.
        prompt: What is asked, in front of the answer.
    """

    def __init__(self, endpoint: Endpoint, *, prompt: str = f"{MASK_PROMPT} {KEEP_NOTE}"):
        self.endpoint = endpoint
        self.prompt = prompt

    def mask(self, texts: Sequence[str]) -> Iterator[tuple[int, Masked]]:
        """Each text's index and what of it is masked, as replies come.

        Raises:
            EndpointError: The endpoint cannot be used; what came before has been given.
        """
        for index, found in self.endpoint.ask_all([self._question(text) for text in texts]):
            yield index, Masked(texts[index], (), found.reason) if isinstance(found, Failure) else found

    def _question(self, text: str) -> Question:
        messages = [{"role": "user", "content": f"{self.prompt}\n\n{text}"}]
        return Question(messages=lambda: messages, read=lambda reply: masked_as(text, reply))


def masked_as(text: str, reply: str) -> Masked:
    """What a reply that repeats `text` with `MASK` in places has masked. Blanks and capitals may differ.

    Example: "A red cup." and "a [MASK] cup ." give the phrase "red".

    Raises:
        RowError: Without its masks the reply is not a part of the text, word by word.
    """
    words = words_of(text)
    known = [text[word.start : word.end].casefold() for word in words]
    pieces = [_known_words(piece) for piece in plain_reply(reply).split(MASK)]
    # Masks with nothing in between are one.
    pieces = [pieces[0], *(piece for piece in pieces[1:-1] if piece), *pieces[1:][-1:]]
    place, gaps = 0, []
    for number, piece in enumerate(pieces):
        is_first, is_last = number == 0, number == len(pieces) - 1
        least = place if is_first else place + 1  # a mask stands for a word at least
        starts = range(least, len(known) - len(piece) + 1)
        if is_first:
            starts = starts[:1]
        elif is_last:
            starts = starts[-1:]
        start = next((start for start in starts if known[start : start + len(piece)] == piece), None)
        if start is None or (is_first and is_last and len(piece) != len(known)):
            raise RowError(
                f"the reply {reply!r:.200} to {text!r:.200}",
                expected=f"the same words, some of them replaced by {MASK}",
                do="ask again, or ask a model that follows instructions better",
            )
        if not is_first:
            gaps.append(Phrase(words[place].start, words[start - 1].end))
        place = start + len(piece)
    return Masked(text, tuple(gaps), reason="" if gaps else NO_PHRASE)


def _known_words(piece: str) -> list[str]:
    return [piece[word.start : word.end].casefold() for word in words_of(piece)]


def _labelled(text: str) -> list[Phrase]:
    """Every word and sign with its kind; "" for what is never masked. A relation of several words is one."""
    words = words_of(text)
    lower = [text[word.start : word.end].lower().replace("’", "'") for word in words]
    quoted = [found.span(found.lastindex or 0) for found in _QUOTED.finditer(text)]
    labelled, place = [], 0
    while place < len(words):
        word = words[place]
        if any(start <= word.start < end for start, end in quoted):
            labelled.append(Phrase(word.start, word.end, OBJECT))
            place += 1
            continue
        length = _relation_length(lower, place)
        if length:
            labelled.append(Phrase(word.start, words[place + length - 1].end, RELATION))
        else:
            kind = ANSWER if place == 0 and lower[0] in ANSWERS else _kind(lower[place])
            labelled.append(Phrase(word.start, word.end, kind))
        place += max(length, 1)
    return labelled


def _relation_length(lower: Sequence[str], place: int) -> int:
    """How many words from `place` on are a relation, the most that are one; 0 for none."""
    most = min(_LONGEST_RELATION, len(lower) - place)
    lengths = range(most, 0, -1)
    return next((length for length in lengths if " ".join(lower[place : place + length]) in RELATIONS), 0)


def _kind(word: str) -> str:
    if word[0].isdigit():
        return NUMBER
    if word in KEPT or not word[0].isalnum():
        return ""
    if word.endswith("ly") and len(word) > 4 and word not in NO_ADVERBS | ATTRIBUTES:
        return ""
    # Of two words tied together the first tells: two-story, red-roofed.
    parts = (word, word.split("-")[0])
    return next((kind for part in parts for words, kind in _CLASSES if part in words), OBJECT)


def _runs(words: Sequence[Phrase], kinds: tuple[str, ...], text: str) -> tuple[Phrase, ...]:
    """Neighbouring words of these kinds as one phrase each."""
    return joined([word for word in words if word.kind in kinds], text)


def _with_articles(words: Sequence[Phrase], phrases: tuple[Phrase, ...], text: str) -> tuple[Phrase, ...]:
    """Take "a" and "an" into the phrase that follows."""
    starts = {phrase.start for phrase in phrases}
    before = [
        first
        for first, second in zip(words[:-1], words[1:], strict=True)
        if second.start in starts and text[first.start : first.end].lower() in ARTICLES
    ]
    return joined([*phrases, *before], text)


def _spoken(words: Sequence[Phrase], text: str) -> list[Phrase]:
    """The words without the signs."""
    return [word for word in words if text[word.start].isalnum()]
