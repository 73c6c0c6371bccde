"""Which visual tokens are one picture, in texts as the processors of SmolVLM, Idefics3 and InternVL write them."""

import pytest
import torch
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from mllm.pruning.pictures import picture_lengths
from mllm.testing import tiny_tokenizer

SPECIAL = ["<image>", "<fake>", "<global-img>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))]
IMAGE, FAKE, WHOLE = SPECIAL[:3]
NUM = 3


@pytest.fixture(scope="module")
def words():
    """A tokenizer that knows the marks as words of their own."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
def test_tiles_and_the_whole_are_one_picture(words, family):
    texts = [
        "Look: " + _picture(2, 2) + "and" + _picture(0, 0) + _picture(1, 2) + " What?",
        "Only text.",
        _picture(0, 0) + _picture(0, 0),
    ]
    assert _lengths(words, family, texts) == [5 * NUM, NUM, 3 * NUM, NUM, NUM]


def test_a_picture_of_internvl_is_what_stands_without_a_word_between(words):
    texts = [f"<fake>{IMAGE * 12}<fake>\n<fake>{IMAGE * 4}<fake> What?", f"{IMAGE * 8}<fake>"]
    assert _lengths(words, "internvl", texts) == [12, 4, 8]


def test_other_models_say_it_themselves(words):
    assert _lengths(words, "llava", [IMAGE * 4]) is None


def _picture(rows, columns):
    return get_image_prompt_string(rows, columns, NUM, FAKE, IMAGE, WHOLE)


def _lengths(words, family, texts):
    ids = words(texts, padding=True, return_tensors="pt").input_ids
    return picture_lengths(family, torch.as_tensor(ids), words.convert_tokens_to_ids(IMAGE))
