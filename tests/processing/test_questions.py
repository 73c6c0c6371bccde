"""Which words are a medium's question, and what they become."""

import torch

from mllm.processing.questions import encode_questions, questions_of
from mllm.testing import tiny_tokenizer


def item(kind: str) -> dict:
    return {"type": kind}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [item("image"), text("What is this?\n"), item("audio"), item("image"), text(" And that?")],
    },
    {"role": "assistant", "content": "A 3."},
    {"role": "user", "content": [text("Look: "), item("image")]},
    {"role": "user", "content": [item("image"), text("  ")]},
    {"role": "user", "content": [text("How many?")]},
]


def test_a_question_is_all_that_its_message_says():
    both = "What is this? And that?"
    assert questions_of(MESSAGES, "image") == [both, both, "Look:", ""]
    assert questions_of(MESSAGES, "audio") == [both]
    assert questions_of(MESSAGES, "video") == []


def test_questions_of_a_batch_stand_in_order_of_appearance():
    tokenizer = tiny_tokenizer("gpt_neox")
    rows = [MESSAGES, [{"role": "user", "content": [item("image"), text("Yes or no?")]}]]
    found = encode_questions(rows, tokenizer, {"image": 50, "video": 50})
    assert found.keys() == {"image_question_ids", "image_question_mask"}
    ids, mask = found.values()
    assert ids.shape == mask.shape and ids.dtype == mask.dtype == torch.long
    texts = [tokenizer.decode(row[: int(counted.sum())]) for row, counted in zip(ids, mask, strict=True)]
    assert texts == ["What is this? And that?"] * 2 + ["Look:", "", "Yes or no?"]
    assert not (mask.diff(dim=1) > 0).any(), "padding stands behind"
    assert mask[3].sum() == 0 and mask.shape[1] == mask.sum(1).max()


def test_a_longer_question_is_cut_and_words_alone_need_no_table():
    tokenizer = tiny_tokenizer("gpt_neox")
    rows = [[{"role": "user", "content": [item("image"), text("How many digits are green? " * 9)]}]]
    found = encode_questions(rows, tokenizer, {"image": 6})
    assert found["image_question_ids"].shape == (1, 6)
    empty = [[{"role": "user", "content": [item("image")]}]]
    assert encode_questions(empty, tokenizer, {"image": 6})["image_question_mask"].tolist() == [[0]]
    assert encode_questions([MESSAGES[:1]], tokenizer, {"image": 6}) == {}
