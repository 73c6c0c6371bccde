"""Hugging Face's conversational form, as TRL, llava-instruct-mix-vsft and others publish it."""

from pathlib import Path

import pytest

from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import EmbeddedBytes, ImportProblem, Record
from mllm.data.schema import parse_row
from mllm.data.sources import Source

SOURCE = Source("data.json")
IMAGE, VIDEO, AUDIO = {"type": "image"}, {"type": "video"}, {"type": "audio"}


def text(words):
    return {"type": "text", "text": words}


def user(content):
    return {"role": "user", "content": content}


def says(content, **more):
    return {"role": "assistant", "content": content, **more}


def convert(fields):
    (row,) = IMPORTERS["conversational"].convert(Record(fields, "data.json, record 1", 0), SOURCE)
    return row


def paths(row):
    return [item["path"] for item in row["media"]]


def test_parts_take_the_images_of_the_column_in_order(import_rows, tmp_path):
    fields = {
        "id": 3,
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "system", "content": "Be short."},
            user([text("Compare "), IMAGE]),
            says([text("With what?")]),
            user([IMAGE]),
            says("Blue."),
        ],
    }
    (row,) = import_rows([fields], "data.jsonl")
    assert row.id == "3" and row.messages == fields["messages"]
    assert [item.path for item in row.media] == [tmp_path / "a.png", tmp_path / "b.png"]


def test_none_keys_that_arrow_adds_are_stripped():
    parts = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "What?", "index": None}]
    row = convert({"images": ["a.png"], "messages": [user(parts), says([{"type": "text", "text": "A.", "x": None}])]})
    assert [message["content"] for message in row["messages"]] == [[IMAGE, text("What?")], [text("A.")]]


def test_index_says_which_image():
    parts = [{"type": "image", "index": 1}, text("or"), {"type": "image", "index": 0}]
    assert paths(convert({"images": ["a", "b"], "messages": [user(parts), says("A.")]})) == ["b", "a"]


def test_parts_with_a_file_of_their_own():
    parts = [{"type": "image", "image": "a"}, {"type": "image", "url": "b"}, {"type": "image", "path": "c"}]
    parts += [{"type": "audio", "audio_url": "d"}, {"type": "video", "video": {"path": "e", "bytes": None}}]
    row = convert({"messages": [user(parts), says("A.")]})
    assert paths(row) == list("abcde")
    assert [item["kind"] for item in row["media"]] == ["image", "image", "image", "audio", "video"]


@pytest.mark.parametrize("column", ["images", "image"])
def test_beside_texts_all_images_go_before_the_first_of_the_user(column):
    image = EmbeddedBytes(b"x")
    value = [image] if column == "images" else image
    messages = [{"role": "system", "content": "S"}, user("What?"), says("A."), user("And?"), says("B.")]
    row = convert({column: value, "messages": messages})
    assert row["media"] == [{"kind": "image", "bytes": image}]
    assert row["messages"][1]["content"] == [IMAGE, text("What?")] and row["messages"][3]["content"] == "And?"


def test_beside_parts_of_text_alone_too():
    row = convert({"images": ["a", "b"], "messages": [user([text("What?")]), says([text("A.")])]})
    assert row["messages"][0]["content"] == [IMAGE, IMAGE, text("What?")]


def test_images_videos_and_audios():
    row = convert({"audios": ["s"], "videos": ["v"], "images": ["i"], "messages": [user("Q"), says("A")]})
    assert len(parse_row(row, where="", root=Path("/data")).media) == 3
    assert row["messages"][0]["content"] == [{"type": item["kind"]} for item in row["media"]] + [text("Q")]
    row = convert({"audios": ["s"], "videos": ["v"], "messages": [user([AUDIO, VIDEO, text("Q")]), says("A")]})
    assert paths(row) == ["s", "v"]


def test_a_string_that_looks_like_a_placeholder_is_text():
    row = convert({"images": ["a"], "messages": [user([IMAGE, text("What is <image>?")]), says("<image>")]})
    assert row["messages"][0]["content"][1] == text("What is <image>?")
    row = convert({"messages": [user("What are <image> and <video>?"), says("A")]})
    assert row["messages"][0]["content"] == "What are <image> and <video>?"


def test_prompt_and_completion():
    (row, words) = (
        convert({"images": ["a"], "prompt": [user([IMAGE]), says("B"), user("Q")], "completion": [says("A")]}),
        convert({"prompt": "Q", "completion": "A"}),
    )
    assert row["messages"] == [user([IMAGE]), says("B", loss=False), user("Q"), says("A")]
    assert words["messages"] == [user("Q"), says("A")]


def test_loss_of_a_message_is_kept():
    row = convert({"messages": [user("Q"), says("A", loss=False), user("R"), says("B", loss=0.5)]})
    assert [message.get("loss") for message in row["messages"]] == [None, False, None, 0.5]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"images": ["a"], "messages": [user([IMAGE, IMAGE]), says("A")]}, "image number 1 and 1 images"),
        ({"images": ["a", "b"], "messages": [user([IMAGE]), says("A")]}, "2 images and parts for 1 of them"),
        ({"messages": [user([IMAGE]), says("A")]}, "image number 0 and 0 images"),
        ({"images": ["a"], "messages": [user([{"type": "image", "index": 4}]), says("A")]}, "image number 4"),
        ({"images": ["a", None], "messages": [user("Q"), says("A")]}, "image = None"),
        ({"images": ["a"], "messages": [{"role": "system", "content": "S"}, says("A")]}, "no message of the user"),
        ({"messages": [user("Q"), {"role": "tool", "content": "A"}]}, "role 'tool'"),
        ({"messages": [user("Q"), says("A", tool_calls=[1])]}, "tool calls"),
        ({"messages": [user("Q"), says(None)]}, "content = None"),
        ({"messages": [user(["Q"]), says("A")]}, "a part 'Q'"),
        ({"messages": [user([{"type": "text", "text": None}]), says("A")]}, "expected type text"),
        ({"messages": "Q"}, "messages with `role`"),
        ({"id": 1}, "neither `messages`"),
    ],
)
def test_problems(fields, problem):
    with pytest.raises(ImportProblem, match=problem):
        convert(fields)


def test_recognised():
    plain = {"messages": [user("Q"), says("A")]}
    parts = {"messages": [user([IMAGE, text("Q")]), says("A")], "images": ["a"]}
    for fields in (plain, parts, plain | {"image": "a"}, {"prompt": "Q", "completion": "A"}):
        assert detect_format([Record(fields, "", 0)], SOURCE).name == "conversational"
    tagged = {"messages": [user("<image>Q"), says("A")], "images": ["a"]}
    assert not IMPORTERS["conversational"].matches(tagged, SOURCE)
    for odd in (None, 3, [], {}, {"messages": None}, {"messages": [1]}, {"messages": [user(3)]}):
        assert not IMPORTERS["conversational"].matches(odd, SOURCE)
