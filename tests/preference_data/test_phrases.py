"""Masked phrases and what is kept around them always make up the answer again."""

import random

import pytest

from mllm.errors import RowError
from mllm.preference_data.phrases import MASK, Masked, Phrase, changed_words, joined, words_of

CAPTION = "There is a red 5 in the top left, and an orange 0 (half-hidden) at 3.5 cm."


def test_an_answer_is_its_kept_words_and_its_phrases():
    masked = Masked("A red cup.", (Phrase(2, 5, "colour"), Phrase(6, 9, "object")))
    assert masked.masked_text == f"A {MASK} {MASK}."
    assert masked.words == ("red", "cup") and masked.kept == ("A ", " ", ".")
    assert masked.filled(("big blue", "dog")) == "A big blue dog."


@pytest.mark.parametrize("seed", range(20))
def test_filled_with_its_own_words_an_answer_is_itself(seed):
    edges = sorted(random.Random(seed).sample(range(len(CAPTION) + 1), 8))
    masked = Masked(CAPTION, tuple(Phrase(*edges[at : at + 2]) for at in range(0, 8, 2)))
    assert masked.filled(masked.words) == CAPTION
    assert len(masked.kept) == len(masked.words) + 1 and all(masked.kept[1:-1])


def test_an_answer_may_be_one_phrase_or_none():
    whole = Masked("yes", (Phrase(0, 3),))
    assert (whole.masked_text, whole.kept, whole.filled(["no"])) == (MASK, ("", ""), "no")
    assert Masked("It is.", ()).kept == ("It is.",) and Masked("It is.", ()).filled([]) == "It is."


@pytest.mark.parametrize(
    "phrases",
    [[(3, 3)], [(5, 2)], [(-1, 2)], [(2, 99)], [(0, 3), (2, 5)], [(0, 2), (2, 5)], [(6, 9), (0, 2)]],
    ids=["empty", "reversed", "before", "behind", "overlap", "touch", "order"],
)
def test_phrases_that_are_none_are_refused(phrases):
    with pytest.raises(RowError, match="phrases"):
        Masked("A red cup.", tuple(Phrase(*phrase) for phrase in phrases))


def test_phrases_with_only_blanks_between_are_joined():
    text = "a red  cup, a dog"
    phrases = [Phrase(12, 13), Phrase(7, 10, "object"), Phrase(2, 5, "colour"), Phrase(14, 17, "object")]
    assert joined(phrases, text) == (Phrase(2, 10, "object"), Phrase(12, 17, "object"))
    assert joined(joined(phrases, text), text) == joined(phrases, text)


def test_words_and_signs_are_all_that_is_not_blank():
    words = [CAPTION[word.start : word.end] for word in words_of(CAPTION)]
    assert "".join(words) == CAPTION.replace(" ", "")
    assert {"half-hidden", "3.5", "(", ","} <= set(words)


PAIRS = [
    ("a red cup", "a blue cup", ["blue"]),
    ("a red cup on a table", "a blue mug on a table", ["blue mug"]),
    ("a cup", "a small cup and two plates", ["small", "and two plates"]),
    ("a small cup", "a cup", []),
    ("yes", "no", ["no"]),
    ("the same", "the same", []),
    ("", "new", ["new"]),
]


@pytest.mark.parametrize(("before", "after", "changed"), PAIRS)
def test_changed_words_are_marked(before, after, changed):
    assert [after[run.start : run.end] for run in changed_words(before, after)] == changed


@pytest.mark.parametrize(("before", "after", "_"), PAIRS)
def test_without_the_changed_words_both_texts_say_the_same(before, after, _):
    def rest(text: str, changed: tuple[Phrase, ...]) -> list[str]:
        words = [word for word in words_of(text) if not any(run.start <= word.start < run.end for run in changed)]
        return [text[word.start : word.end] for word in words]

    assert rest(after, changed_words(before, after)) == rest(before, changed_words(after, before))
