"""Placeholders get an unused row of the embedding; control tokens in words are cut so that none is left."""

import pytest

from mllm.errors import CompositionError
from mllm.processing.control import add_placeholder, control_pattern, control_tokens, cut_control_tokens
from mllm.testing import TOKENIZER_KINDS, tiny_tokenizer


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_placeholder_is_one_token_that_words_do_not_make(kind, tmp_path):
    tokenizer = tiny_tokenizer(kind)
    size = len(tokenizer)
    assert add_placeholder(tokenizer, "<image>", num_rows=size + 20) == size
    assert add_placeholder(tokenizer, "<image>", num_rows=size + 20) == size, "a second time changes nothing"
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, type(tokenizer).from_pretrained(tmp_path)):
        assert loaded("<image><image>", add_special_tokens=False)["input_ids"] == [size, size]
        assert loaded.convert_ids_to_tokens(size) == "<image>"
        assert loaded.decode([size], skip_special_tokens=True) == ""


def test_no_row_left_means_the_first_new_one():
    tokenizer = tiny_tokenizer("llama3")
    size = len(tokenizer)
    assert add_placeholder(tokenizer, "<image>", num_rows=size) == size
    assert "<|reserved_special_token_0|>" in tokenizer.get_vocab()


def test_more_tokens_than_rows():
    tokenizer = tiny_tokenizer("qwen")
    with pytest.raises(CompositionError, match="an embedding of 300 rows"):
        add_placeholder(tokenizer, "<image>", num_rows=300)


def test_a_structural_token_that_is_not_called_special_is_a_control_token_all_the_same():
    """Some ChatML models add <|im_start|> as an ordinary token."""
    tokenizer = tiny_tokenizer("gpt_neox")
    tokenizer.add_tokens(["<|im_start|>", "<think>"], special_tokens=False)
    assert control_tokens(tokenizer, "<image>", None) == ["<|endoftext|>", "<|im_start|>", "<image>"]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("a <image> b", "a <¦image> b"),
        ("<image><image>", "<¦image><¦image>"),
        ("</s>x", "<¦/s>x"),
        ("<<x>>", "<¦<¦x>>"),
        ("§ is one character and cannot be cut", "§ is one character and cannot be cut"),
        ("", ""),
    ],
)
def test_cut(text, cut):
    pattern = control_pattern(["<image>", "</s>", "<<x>>", "<x>", "§"])
    assert cut_control_tokens(text, pattern, "¦") == cut
    assert not any(pattern.search(piece) for piece in cut.split("¦"))
