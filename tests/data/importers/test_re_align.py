"""Re-Align's pref_data.json, from a hand-written miniature of what its loader reads."""

import json

import pytest

from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import Drop, ImportProblem, Record
from mllm.data.importers.preferences import LEFT_OUT
from mllm.data.reading.read import read_records
from mllm.data.schema import parse_row
from mllm.data.sources import Source

ASK = {"role": "user", "content": "<image>\nWhat is on the table?"}


def answer(words):
    return {"role": "assistant", "content": words}


ROW = {
    "image": "COCO_train2014_000000000009.jpg",
    "retrieved_image": "COCO_train2014_000000000025.jpg",
    "chosen": [ASK, answer("A bowl of broccoli.")],
    "rejected": [ASK, answer("A bowl of soup.")],
}


def convert(**changes):
    (row,) = IMPORTERS["re_align"].convert(Record({**ROW, **changes}, "f", 0), Source("f"))
    return row


def test_the_published_json(tmp_path):
    path = tmp_path / "pref_data.json"
    path.write_text(json.dumps([ROW]))
    source = Source(path)
    records = list(read_records(source))
    importer = detect_format(records, source)
    assert importer.name == "re_align"
    (fields,) = importer.convert(records[0], source)
    assert fields == {
        "id": "00000000",
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is on the table?"}]}
        ],
        "media": [{"kind": "image", "path": "COCO_train2014_000000000009.jpg"}],
        "chosen": {"content": "A bowl of broccoli."},
        "rejected": {"content": "A bowl of soup."},
        "contrast": [{"kind": "image", "path": "COCO_train2014_000000000025.jpg"}],
    }
    row = parse_row(fields, where="f", root=tmp_path)
    assert [item.path.name for item in row.contrast] == ["COCO_train2014_000000000025.jpg"]
    assert row.chosen.media is None and row.rejected.media is None  # both texts are read under the row's own image


def test_several_turns():
    talk = [ASK, answer("Food."), {"role": "user", "content": "Which <image> food?"}]
    row = convert(chosen=[*talk, answer("Broccoli.")], rejected=[*talk, answer("Soup.")])
    assert [message["content"] for message in row["messages"][1:]] == ["Food.", "Which <image> food?"]
    assert row["chosen"] == {"content": "Broccoli."}


def test_without_a_retrieved_image_the_texts_are_a_pair():
    row = convert(retrieved_image=None)
    assert "contrast" not in row and row["meta"] == {LEFT_OUT: {"no retrieved image": 1}}
    with pytest.raises(Drop, match="both answers are the same"):
        convert(retrieved_image=None, rejected=ROW["chosen"])


def test_the_same_words_under_two_images_are_a_pair():
    assert convert(rejected=ROW["chosen"])["contrast"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": [{"role": "user", "content": "<image>\nWho?"}, answer("A bowl.")]}, "different prompts"),
        ({"rejected": [ASK]}, "different prompts"),
        ({"chosen": [ASK], "rejected": [ASK]}, "chosen ends with a message of the user"),
        ({"chosen": "A bowl."}, "chosen = 'A bowl.'"),
        ({"image": None}, None),  # then <image> is text, and the retrieved image stands for nothing
        ({"chosen": [answer("A")], "rejected": [answer("B")]}, "no message of the user"),
    ],
)
def test_malformed(changes, message, tmp_path):
    if message is None:
        with pytest.raises(ValueError, match="contrast: 1 media items"):
            parse_row(convert(**changes), where="f", root=tmp_path)
        return
    with pytest.raises(ImportProblem, match=message):
        convert(**changes)
