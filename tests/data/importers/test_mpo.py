"""MMPR's JSONL, from hand-written miniatures of what InternVL's loader reads."""

import json

import pytest

from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import ImportProblem, Record
from mllm.data.reading.read import read_records
from mllm.data.schema import parse_row
from mllm.data.sources import Source

PAIR = {"chosen": "Four.", "rejected": "Five."}
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(words):
    return {"type": "text", "text": words}


def convert(**fields):
    (row,) = IMPORTERS["mpo"].convert(Record({**PAIR, **fields}, "f", 0), Source("f"))
    return row


def test_the_published_jsonl(tmp_path):
    path = tmp_path / "mmpr.jsonl"
    rows = [
        {"id": 7, "image": "a/1.png", "question": "How many?", **PAIR},
        {"image": "", "question": "Is <image> a tag?", **PAIR},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(path)
    records = list(read_records(source))
    importer = detect_format(records, source)
    assert importer.name == "mpo"
    one, two = (row for record in records for row in importer.convert(record, source))
    assert one == {
        "id": "7",
        "messages": [{"role": "user", "content": [IMAGE, text("How many?")]}],
        "media": [{"kind": "image", "path": "a/1.png"}],
        "chosen": {"content": "Four."},
        "rejected": {"content": "Five."},
    }
    assert two["id"] == "00000001" and two["media"] == []
    assert two["messages"][0]["content"] == [text("Is <image> a tag?")]  # no image, so the string is text
    for row in (one, two):
        parse_row(row, where="f", root=tmp_path)


def test_strings_are_where_the_media_stand():
    row = convert(image=["1.png", "2.png"], question="Image-1: <image>\nImage-2: <image>\nWhich?")
    assert row["messages"][0]["content"] == [text("Image-1: "), IMAGE, text("Image-2: "), IMAGE, text("Which?")]
    assert [item["path"] for item in row["media"]] == ["1.png", "2.png"]
    assert convert(image="1.png", question="See <image>")["messages"][0]["content"] == [text("See "), IMAGE]


def test_a_video_and_its_clip():
    row = convert(video="v.mp4", clip=[2, 7.5], question="<video>\nWhat? <image>")
    assert row["messages"][0]["content"] == [VIDEO, text("What? <image>")]
    assert row["media"] == [{"kind": "video", "path": "v.mp4", "start": 2, "end": 7.5}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": ["1.png", "2.png"], "question": "Which?"}, "0 strings <image> in the texts and 2 images"),
        ({"image": "1.png", "question": "<image> <image>"}, "2 strings <image>"),
        ({"image": ["1.png", None], "question": "<image><image>"}, "image = None"),
        ({"image": {"size": 3}, "question": "What?"}, "image = "),
        ({"question": "What?", "video": "v.mp4", "clip": 3}, "clip = 3"),
        ({"question": "What?", "rejected": None}, "rejected = None"),
        ({"question": ["What?"]}, "question = "),
    ],
)
def test_malformed(fields, message):
    with pytest.raises(ImportProblem, match=message):
        convert(**fields)
