"""Ids become text piece by piece: nothing lost, nothing in half."""

import random

import pytest

from mllm.inference.text_stream import LONGEST_WINDOW, UNFINISHED, TextStream, decode_answer
from mllm.testing import TOKENIZER_KINDS, tiny_tokenizer

TEXTS = [
    "The picture shows a red 3 at the top left.",
    "Größe: 5 µm – „naïve“",
    "漢字かな交じり文",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈!",
    "  two  blanks\n\n\nand lines \n",
    "é",
    "",
    "a" * 200 + "é" * 100,
]


@pytest.fixture(params=TOKENIZER_KINDS)
def tokenizer(request):
    return tiny_tokenizer(request.param)


def _pieces(tokenizer, ids) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.end()]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_joined_are_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = _pieces(tokenizer, ids)
    assert "".join(pieces) == decode_answer(tokenizer, ids)
    assert not any(UNFINISHED in piece for piece in pieces)


def test_a_character_comes_whole():
    tokenizer = tiny_tokenizer("qwen")
    ids = tokenizer("🙂!", add_special_tokens=False).input_ids
    assert len(ids) == 5  # four bytes and "!"
    assert _pieces(tokenizer, ids) == ["", "", "", "🙂", "!", ""]


def test_blanks_between_words_survive():
    tokenizer = tiny_tokenizer("llama2")
    ids = tokenizer("is there a 5", add_special_tokens=False).input_ids
    assert "".join(_pieces(tokenizer, ids)) == "is there a 5"


def test_pieces_come_early(tokenizer):
    ids = tokenizer("The picture shows a red 3.", add_special_tokens=False).input_ids
    assert all(_pieces(tokenizer, ids)[:-1])  # plain words: every token shows something at once


def test_random_bytes_do_not_break_the_stream(tokenizer):
    """What a young model says: bytes that are no UTF-8. The text around them stays, and the window is bounded."""
    control = set(tokenizer.all_special_ids)
    vocabulary = [token for token in range(len(tokenizer)) if token not in control]
    for seed in range(20):
        ids = random.Random(seed).choices(vocabulary, k=100)
        stream = TextStream(tokenizer)
        pieces = []
        for token in ids:
            pieces.append(stream.push(token))
            assert len(stream._window) <= 2 * (LONGEST_WINDOW + 1)
        pieces.append(stream.end())
        text = decode_answer(tokenizer, ids)
        if tokenizer.bos_token != "<s>":  # SentencePiece spoils a whole run of byte tokens for one bad one behind it
            assert "".join(pieces).replace(UNFINISHED, "") == text.replace(UNFINISHED, "")


def test_control_tokens_are_not_shown(tokenizer):
    word = tokenizer("red", add_special_tokens=False).input_ids
    assert "".join(_pieces(tokenizer, [*word, tokenizer.eos_token_id])) == decode_answer(tokenizer, word)


def test_a_long_run_of_unfinished_bytes_is_shown_at_last():
    tokenizer = tiny_tokenizer("qwen")
    first_byte = tokenizer("é", add_special_tokens=False).input_ids[0]
    ids = [first_byte] * (3 * LONGEST_WINDOW)
    assert "".join(_pieces(tokenizer, ids)).strip(UNFINISHED) == ""
    assert any(_pieces(tokenizer, ids)[:-1])
