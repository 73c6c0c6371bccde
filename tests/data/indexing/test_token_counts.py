"""Counted tokens are exactly those of encoding, for any words under any template, and never more than their bound."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from mllm.data.indexing import token_counts
from mllm.data.indexing.index import open_index
from mllm.data.indexing.token_bounds import token_bounds
from mllm.data.indexing.token_counts import chats_of, count_tokens, fingerprint
from mllm.data.sources import Source
from mllm.errors import RowError
from mllm.processing.build import add_placeholder, build_processor
from mllm.processing.chat_lengths import Chat, ChatLengths
from mllm.sizes import ImageTokenRule
from mllm.testing import tiny_tokenizer
from mllm.testing_chats import conversation

RULE = ImageTokenRule(image_size=16, patch_size=8, num_prefix_tokens=1, feature_select="default")
ANSWER = {"role": "assistant", "content": "No."}
PAIRS = [
    *[("qwen", "chatml"), ("qwen", "vicuna_v1"), ("qwen", "plain"), ("llama3", "llama3"), ("llama3", "vicuna_v1")],
    *[("llama2", "vicuna_v1"), ("llama2", "plain"), ("gpt_neox", "vicuna_v1"), ("gpt_neox", "plain")],
]


def _processor(kind="qwen", template=None, *, rule=RULE):
    tokenizer = tiny_tokenizer(kind)
    if rule is None:
        return build_processor(tokenizer, rules={}, chat_template=template)
    add_placeholder(tokenizer, "<image>", num_rows=len(tokenizer) + 1)
    return build_processor(tokenizer, CLIPImageProcessorPil(), rules={"image": rule}, chat_template=template)


def _num_images(messages) -> int:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return sum(item["type"] == "image" for content in contents for item in content)


@pytest.fixture
def indexed(tmp_path):
    """An index of conversations; each image item is the same picture."""

    def make(*conversations: list[dict], **more):
        Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
        with (tmp_path / "rows.jsonl").open("w") as file:
            for number, messages in enumerate(conversations):
                media = [{"kind": "image", "path": "a.png"}] * _num_images(messages)
                file.write(json.dumps({"id": number, "messages": messages, "media": media} | more) + "\n")
        source = Source(tmp_path / "rows.jsonl", format="mllm", on_bad="quarantine", max_bad_rate=0.3)
        return open_index(source, cache_dir=tmp_path / "cache")

    return make


def _encoded_length(chat, processor) -> int:
    try:
        return len(processor.encode_chat(chat.messages, media_sizes=chat.media_sizes).input_ids)
    except RowError:
        return 0


@pytest.mark.parametrize(("kind", "template"), PAIRS)
def test_counts_are_lengths_of_encoded_chats_and_within_bounds(kind, template, indexed):
    draw = random.Random(f"{kind} {template}")
    processor = _processor(kind, template)
    assert processor.chat_encoder().render.is_opaque
    index = indexed(*(conversation(draw) for _ in range(150)))
    expected = [_encoded_length(chat, processor) for row in index for chat in chats_of(row, "pad")]
    counts = count_tokens(index, processor)
    assert counts.dtype == np.uint32
    assert counts.tolist() == expected
    assert sum(count > 0 for count in expected) > 100
    bounds = token_bounds(index, processor)
    assert (bounds >= counts).all()


def test_plain_conversations_need_no_encoding(monkeypatch):
    """Else the law above would compare `encode_chat` with itself."""
    processor = _processor("qwen", "chatml")
    lengths = ChatLengths(processor)
    chat = Chat([{"role": "user", "content": "Is there a 5?\n"}, {"role": "assistant", "content": "No."}])
    expected = [_encoded_length(chat, processor)]
    monkeypatch.setattr(type(processor), "encode_chat", None)
    assert lengths([chat]) == expected
    assert lengths([]) == []


@pytest.mark.parametrize("loss", ["yes", -1, float("nan"), True])
def test_what_encoding_refuses_counts_as_nothing(loss):
    lengths = ChatLengths(_processor("qwen", "chatml"))
    asked = {"role": "user", "content": "Is there a 5?"} | ({"loss": loss} if loss is True else {})
    chat = Chat([asked, {"role": "assistant", "content": "No.", "loss": loss}])
    assert _encoded_length(chat, lengths.processor) == 0
    assert lengths([chat]) == [0]


@pytest.mark.parametrize(
    ("text", "coordinates"), [("\u0958" * 500, ""), ("[1,2,3,4] " * 200, "pixel"), ("\x01" * 1000, "")]
)
def test_texts_that_grow_stay_within_their_bound(text, coordinates, indexed):
    """Under NFC, or with the numbers of their boxes; or that no merge makes shorter."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    index = indexed([asked, ANSWER], coordinates=coordinates)
    for kind, template in PAIRS[:-4]:
        processor = _processor(kind, template)
        assert token_bounds(index, processor)[0] >= count_tokens(index, processor)[0] > 0


def test_a_template_that_looks_at_words_is_not_guessed(indexed):
    template = _processor("qwen", "chatml").chat_template.replace(
        "message.content | trim", "(message.content.split('</think>') | last | trim)"
    )
    processor = _processor("qwen", template)
    assert not processor.chat_encoder().render.is_opaque
    ask = {"role": "user", "content": "Why?"}
    index = indexed(*([ask, {"role": "assistant", "content": text}] for text in ("a</think>b", "no", " straße")))
    expected = [_encoded_length(chat, processor) for row in index for chat in chats_of(row, "pad")]
    assert count_tokens(index, processor).tolist() == expected


def test_a_model_of_text_counts_text_and_refuses_images(indexed):
    processor = _processor(rule=None)
    answer = {"role": "assistant", "content": "yes"}
    index = indexed(
        [{"role": "user", "content": [{"type": "image"}]}, answer], [{"role": "user", "content": "<image>"}, answer]
    )
    expected = [_encoded_length(chat, processor) for row in index for chat in chats_of(row, None)]
    counts = count_tokens(index, processor).tolist()
    assert counts == expected
    assert counts[0] == 0 < counts[1]
    assert (token_bounds(index, processor) >= counts).all()


def test_a_preference_counts_as_its_longest_side(indexed):
    processor = _processor()
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    sides = {"chosen": {"content": "Because it is red and there is a 3."}, "rejected": {"content": "No."}}
    index = indexed(ask, **sides, contrast=[{"kind": "image", "path": "a.png"}])
    lengths = [
        len(
            processor.encode_chat(
                [*ask, {"role": "assistant", "content": side["content"]}], media_sizes=[(10, 20)]
            ).input_ids
        )
        for side in sides.values()
    ]
    assert lengths[0] > lengths[1]
    assert count_tokens(index, processor).tolist() == [lengths[0]]
    assert token_bounds(index, processor)[0] >= lengths[0]


def test_moved_boxes_are_counted_as_they_are_trained_on(indexed):
    processor = _processor()
    ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where? [1, 1, 4, 4]"}]}
    index = indexed([ask, {"role": "assistant", "content": "[1,2,3,4]"}], coordinates="pixel")
    [chat] = chats_of(index[0], processor.image_geometry)
    assert "[1,2,3,4]" not in str(chat.messages)
    assert count_tokens(index, processor).tolist() == [_encoded_length(chat, processor)]
    assert token_bounds(index, processor)[0] >= _encoded_length(chat, processor)


def _many(count: int) -> list[list[dict]]:
    return [
        [{"role": "user", "content": "a" * (number % 17)}, {"role": "assistant", "content": "No."}]
        for number in range(count)
    ]


def test_a_second_call_counts_nothing(indexed, monkeypatch):
    index, processor = indexed(*_many(5)), _processor()
    counts = count_tokens(index, processor).tolist()
    monkeypatch.setattr(token_counts, "_counted", None)
    assert count_tokens(index, _processor()).tolist() == counts
    with pytest.raises(TypeError):
        count_tokens(index, _processor("llama3", "llama3"))


def test_an_interrupted_pass_goes_on_where_it_was(indexed, monkeypatch):
    monkeypatch.setattr(token_counts, "CHUNK_ROWS", 4)
    index, processor = indexed(*_many(30)), _processor()
    counted, started = token_counts._counted, []

    def interrupted(index, processor, starts, workers):
        started.append(list(starts))
        yield from itertools.islice(counted(index, processor, starts, workers), 3 if len(started) == 1 else None)
        if len(started) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(token_counts, "_counted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        count_tokens(index, processor)
    seen = []
    counts = count_tokens(index, processor, progress=seen.append)
    assert started == [list(range(0, 30, 4)), list(range(12, 30, 4))]
    assert sum(seen) == 30
    assert counts.tolist() == [_encoded_length(chat, processor) for row in index for chat in chats_of(row, "pad")]


@pytest.mark.slow
def test_several_processes_count_the_same(indexed, monkeypatch):
    index, processor = indexed(*_many(5000)), _processor()
    assert count_tokens(index, processor, workers=2).tolist() == [
        _encoded_length(chat, processor) for row in index for chat in chats_of(row, "pad")
    ]


def test_the_fingerprint_is_of_what_decides_about_tokens():
    first = fingerprint(_processor())
    used = _processor()
    used.tokenizer("a", padding="max_length", max_length=5)
    assert fingerprint(used) == first
    others = [_processor("llama3"), _processor("qwen", "vicuna_v1")]
    others.append(_processor(rule=dataclasses.replace(RULE, image_size=32)))
    assert len({first, *map(fingerprint, others)}) == 4
