"""LLaVA's form and its relatives, as published."""

import json

import pytest

from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import EmbeddedBytes, ImportProblem, Record
from mllm.data.sources import Source

SOURCE = Source("data.json")
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(words):
    return {"type": "text", "text": words}


def human(words):
    return {"from": "human", "value": words}


def gpt(words):
    return {"from": "gpt", "value": words}


def convert(fields, number=7):
    return list(IMPORTERS["llava"].convert(Record(fields, "data.json, record 8", number), SOURCE))


def contents(fields):
    (row,) = convert(fields)
    return [message["content"] for message in row["messages"]]


def test_a_row_of_mix665k(import_rows, tmp_path):
    published = """[
      {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat are the colors of the bus?"},
        {"from": "gpt", "value": "The bus is white and red."},
        {"from": "human", "value": "What feature can be seen on the back?"},
        {"from": "gpt", "value": "An advertisement."}]},
      {"id": 4102, "model": "", "conversations": [
        {"from": "human", "value": "Write <image> in HTML."},
        {"from": "gpt", "value": "<img>"}]}
    ]"""
    bus, html = import_rows(published)
    assert (bus.id, [item.path for item in bus.media]) == (
        "000000033471",
        [tmp_path / "coco/train2017/000000033471.jpg"],
    )
    assert bus.messages == [
        {"role": "user", "content": [IMAGE, text("What are the colors of the bus?")]},
        {"role": "assistant", "content": "The bus is white and red."},
        {"role": "user", "content": "What feature can be seen on the back?"},
        {"role": "assistant", "content": "An advertisement."},
    ]
    assert (html.id, html.media, html.meta) == ("4102", (), {"model": ""})
    assert html.messages[0]["content"] == "Write <image> in HTML."


@pytest.mark.parametrize("asked", ["<image>\nWhat?", "What?\n<image>", " <image> What? ", "What?<image>"])
def test_the_one_image_of_a_turn_goes_to_its_front(asked):
    assert contents({"image": "a.jpg", "conversations": [human(asked), gpt("A.")]})[0] == [IMAGE, text("What?")]


def test_a_row_of_pretraining_and_an_image_without_words():
    for asked in ("Give a brief description.\n<image>", "<image>"):
        (row,) = convert({"id": "0", "image": "0/1.jpg", "conversations": [human(asked), gpt("a mug")]})
        assert row["media"] == [{"kind": "image", "path": "0/1.jpg"}]
        assert row["messages"][0]["content"][0] == IMAGE
    assert row["messages"][0]["content"] == [IMAGE]


def test_several_images_stay_where_they_are():
    fields = {
        "image": ["a.jpg", "b.jpg", "c.jpg"],
        "conversations": [
            human("First: <image>\n\nThen <image>, which?"),
            gpt("The second."),
            human("And <image>?"),
            gpt("No."),
        ],
    }
    (row,) = convert(fields)
    assert [item["path"] for item in row["media"]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert row["messages"][0]["content"] == [text("First: "), IMAGE, text("\nThen "), IMAGE, text(", which?")]
    assert row["messages"][2]["content"] == [IMAGE, text("And ?")]


def test_a_list_of_one_image_and_an_empty_one():
    assert contents({"image": ["a.jpg"], "conversations": [human("<image>\nQ"), gpt("A")]})[0] == [IMAGE, text("Q")]
    for nothing in (None, "", []):
        assert contents({"image": nothing, "conversations": [human("<image> Q"), gpt("A")]})[0] == "<image> Q"


def test_strings_in_answers_are_text():
    fields = {"image": "a.jpg", "conversations": [human("<image>\nQ"), gpt("The tag <image>."), human("R"), gpt("S")]}
    assert contents(fields)[1] == "The tag <image>."


def test_strings_of_another_kind_are_text():
    fields = {"image": "a.jpg", "conversations": [human("<image>\nWhat is <video>?"), gpt("A tag.")]}
    assert contents(fields)[0] == [IMAGE, text("What is <video>?")]


@pytest.mark.parametrize("string", ["<image>", "<video>"])
def test_a_video(string):
    (row,) = convert({"video": "v.mp4", "conversations": [human(f"{string}\nWhat happens?"), gpt("Rain.")]})
    assert row["media"] == [{"kind": "video", "path": "v.mp4"}]
    assert row["messages"][0]["content"] == [VIDEO, text("What happens?")]


def test_an_image_and_a_video():
    fields = {"video": "v.mp4", "image": "a.jpg", "conversations": [human("<video> or <image>?"), gpt("Both.")]}
    (row,) = convert(fields)
    assert [item["kind"] for item in row["media"]] == ["video", "image"]
    assert row["messages"][0]["content"] == [VIDEO, text(" or "), IMAGE, text("?")]


@pytest.mark.parametrize(
    ("image", "asked", "problem"),
    [
        ("a.jpg", "What?", "0 strings <image> in the texts and 1 images"),
        ("a.jpg", "<image>\nWhat is <image>?", "2 strings <image> in the texts and 1 images"),
        (["a.jpg", "b.jpg"], "<image>\nWhat?", "1 strings <image> in the texts and 2 images"),
        (["a.jpg", None], "<image><image>", "image = None"),
        ({"a": 1}, "<image>", "image = {'a': 1}"),
    ],
)
def test_strings_and_images_that_disagree(image, asked, problem):
    with pytest.raises(ImportProblem, match=problem.replace("(", "\\(")):
        convert({"image": image, "conversations": [human(asked), gpt("A.")]})


def test_a_first_turn_of_the_model_is_dropped_and_a_system_turn_is_kept():
    fields = {"conversations": [gpt("Hello!"), human("Q"), gpt("A")]}
    assert contents(fields) == ["Q", "A"]
    (row,) = convert({"conversations": [{"from": "system", "value": "Be short."}, human("Q"), gpt("A"), human("R")]})
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "user"]
    (row,) = convert({"system": "Be short.", "conversations": [human("Q"), gpt("A")]})
    assert row["messages"][0] == {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([], "expected user, assistant"),
        ([human("Q")], "turns of user; expected"),
        ([gpt("A")], "expected user, assistant"),
        ([human("Q"), human("R"), gpt("A")], "turns of user, user, assistant"),
        ([gpt("A"), gpt("B"), human("Q"), gpt("C")], "turns of assistant, user"),
        ([human("Q"), {"from": "system", "value": "S"}, gpt("A")], "turns of user, system"),
        ([human("Q"), {"from": "bing", "value": "A"}], "from = 'bing'"),
        ([human("Q"), {"from": "gpt", "value": None}], "value = None"),
        ([human("Q"), "A"], "a turn 'A'"),
        ("Q", "no list of `conversations`"),
    ],
)
def test_turns_that_make_no_conversation(turns, problem):
    with pytest.raises(ImportProblem, match=problem):
        convert({"conversations": turns})


def test_roles_under_their_other_names():
    turns = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]
    (row,) = convert({"conversations": turns})
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_ids_sources_and_packed_lists():
    row = {"conversations": [human("Q"), gpt("A")]}
    assert convert(row)[0]["id"] == "00000007"
    assert convert(row | {"id": 0, "data_source": "ai2d"})[0] | {"messages": []} == {
        "id": "0",
        "source": "ai2d",
        "messages": [],
        "media": [],
    }
    assert [made["id"] for made in convert([row | {"id": "x"}, row])] == ["x/0", "00000007/1"]


def test_embedded_images():
    image = EmbeddedBytes(b"x", {"container": "a.parquet", "column": "image", "row": 0, "position": -1})
    (row,) = convert({"image": image, "conversations": [human("<image>\nQ"), gpt("A")]})
    assert row["media"] == [{"kind": "image", "bytes": image}]


def test_recognised(tmp_path):
    turns = [human("Q"), gpt("A")]
    for fields in (
        {"conversations": turns},
        {"id": 1, "image": "a", "conversations": turns},
        [{"conversations": turns}],
    ):
        assert detect_format([Record(fields, "", 0)], SOURCE).name == "llava"
    for other in ({"images": ["a"]}, {"chosen": "c", "rejected": "r"}):
        assert not IMPORTERS["llava"].matches({"conversations": turns} | other, SOURCE)
    for odd in (None, 3, "text", [], {}, {"conversations": None}, {"conversations": [1]}, json.loads("[[]]")):
        assert not IMPORTERS["llava"].matches(odd, SOURCE)
