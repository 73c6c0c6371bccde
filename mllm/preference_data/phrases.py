"""What the steps of Re-Align's construction hand each other: phrases of an answer, and answers completed anew.

mask       an answer   -> `Masked`: which phrases of it say what is seen
complete   a `Task`    -> `Completion`: the answer with these phrases written anew, under another image
accept     the two     -> whether they differ enough; `acceptance.py`

Steps that may take long yield `(index, result)` as results come in, in any order, so that each can be kept at once: a
construction that is killed asks nobody twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from re import compile as pattern
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mllm.errors import RowError

MASK = "[MASK]"
"""How a masked phrase is written, in the paper's prompts."""

NO_PHRASE = "no phrase to mask"
UNANSWERED = "the endpoint gave no answer"
BAD_REPLY = "the reply is of no use"
NO_ROOM = "longer than the model's context"
EMPTY = "the completion is empty"
MASK_LEFT = "the completion still holds a mask"
UNCHANGED = "the completion says the same words"
TOO_SIMILAR = "the completion is too similar"
REASONS = (NO_PHRASE, UNANSWERED, BAD_REPLY, NO_ROOM, EMPTY, MASK_LEFT, UNCHANGED, TOO_SIMILAR)
"""Why an answer or a completion is left out: `reason` of the types below, and what a report counts. Of `UNANSWERED` a
later run may ask again; the others are final."""

_WORD = pattern(r"\d+(?:[.,:/]\d+)+|\w+(?:['’-]\w+)*|[^\w\s]")


class Phrase(NamedTuple):
    """A run of characters of an answer that says what is seen.

    Args:
        start: Its first character.
        end: One behind its last.
        kind: What it names: "object", "attribute", "colour", "number", "relation"; "" where nobody said.
    """

    start: int
    end: int
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Masked:
    """An answer, and which of its phrases are to be written anew.

    Example: in "A red cup." the phrase (2, 5, "colour") gives the `masked_text` "A [MASK] cup.".

    Args:
        text: The whole answer.
        phrases: In order; they neither touch nor overlap.
        reason: Why there are none, one of `REASONS`; "" where there are.
    """

    text: str
    phrases: tuple[Phrase, ...]
    reason: str = ""

    def __post_init__(self):
        ends = [0, *(phrase.end for phrase in self.phrases)]
        starts = [*(phrase.start for phrase in self.phrases), len(self.text)]
        inside = all(phrase.start < phrase.end for phrase in self.phrases)
        apart = all(end < start for end, start in zip(ends[1:-1], starts[1:-1], strict=True))
        if not (inside and apart and starts[0] >= 0 and ends[-1] <= len(self.text)):
            raise RowError(
                f"phrases {list(self.phrases)!r:.120} of {self.text!r:.60}",
                expected=f"runs within its {len(self.text)} characters, in order, with something between them",
                do="join phrases that touch",
            )

    @property
    def kept(self) -> tuple[str, ...]:
        """What stays as it is: the text before, between and behind the phrases, one piece more than phrases."""
        edges = [0, *(edge for phrase in self.phrases for edge in phrase[:2]), len(self.text)]
        return tuple(self.text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True))

    @property
    def masked_text(self) -> str:
        """The answer with `MASK` in place of each phrase."""
        return MASK.join(self.kept)

    @property
    def words(self) -> tuple[str, ...]:
        """The phrases themselves."""
        return tuple(self.text[phrase.start : phrase.end] for phrase in self.phrases)

    def filled(self, words: Sequence[str]) -> str:
        """The answer with other words in place of its phrases, one for each."""
        first, *others = self.kept
        return first + "".join(word + piece for word, piece in zip(words, others, strict=True))


@dataclass(frozen=True, slots=True)
class Task:
    """An answer to be completed under another image.

    Args:
        masked: The better answer, masked.
        messages: The row's messages up to the answer, with the retrieved media in their content items as `Chat` takes
            them, such as `{"type": "image", "image": a path or bytes}`.
    """

    masked: Masked
    messages: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer completed under another image.

    Args:
        text: The whole answer; "" where there is none.
        reason: Why there is none, one of `REASONS`; "" where there is.
    """

    text: str
    reason: str = ""


@runtime_checkable
class Masker(Protocol):
    """Finds the phrases of answers."""

    def mask(self, texts: Sequence[str]) -> Iterator[tuple[int, Masked]]:
        """Each text's index and what of it is masked, in any order, as they come."""


@runtime_checkable
class Completer(Protocol):
    """Writes masked phrases anew while it looks at another image."""

    def complete(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Completion]]:
        """Each task's index and its completion, in any order, as they come."""


def changed_words(before: str, after: str) -> tuple[Phrase, ...]:
    """The runs of words of `after` that `before` does not have at that place, for marking them on a page.

    Example: "a red cup", "a blue cup" gives the run "blue".
    """
    old, new = (list(_WORD.finditer(text)) for text in (before, after))
    blocks = SequenceMatcher(a=[it[0] for it in old], b=[it[0] for it in new], autojunk=False).get_matching_blocks()
    edges = [0, *(edge for block in blocks for edge in (block.b, block.b + block.size))]
    gaps = [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=False) if first < last]
    return tuple(Phrase(new[first].start(), new[last - 1].end()) for first, last in gaps)


def joined(phrases: Sequence[Phrase], text: str) -> tuple[Phrase, ...]:
    """Phrases in order, those that overlap, touch or have only spaces between them made one.

    One made of several keeps the kind of its last, which in English is the noun.
    """
    found: list[Phrase] = []
    for phrase in sorted(phrases):
        if found and not text[found[-1].end : phrase.start].strip():
            phrase = Phrase(found[-1].start, max(found.pop().end, phrase.end), phrase.kind)
        found.append(phrase)
    return tuple(found)


def words_of(text: str) -> list[Phrase]:
    """The words and the signs of a text, one phrase each."""
    return [Phrase(found.start(), found.end()) for found in _WORD.finditer(text)]
