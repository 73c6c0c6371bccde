"""WebDataset shards, real tars."""

import io
import json
import tarfile

import pytest

from mllm.data.importers import detect_format
from mllm.data.importers.base import ImportProblem
from mllm.data.reading.read import read_records
from mllm.data.sources import Source

IMAGE = {"type": "image"}


@pytest.fixture
def import_tar(tmp_path):
    """The rows of a tar with these members."""

    def run(members, **source):
        path = tmp_path / "shard-000000.tar"
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        described = Source(path, **source)
        records = list(read_records(described))
        importer = detect_format(records, described)
        assert importer.name == "webdataset"
        return [row for record in records for row in importer.convert(record, described)]

    return run


def text(words):
    return {"type": "text", "text": words}


def names(row):
    return [(item["kind"], item["bytes"].name) for item in row["media"]]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp"])
def test_captions(import_tar, suffix):
    members = {f"a/0.{suffix}": b"one", "a/0.txt": b" a mug <image>\n", f"a/1.{suffix}": b"two", "a/1.txt": b"a cup"}
    first, second = import_tar(members)
    assert first["messages"] == [
        {"role": "user", "content": [IMAGE]},
        {"role": "assistant", "content": "a mug <image>"},
    ]
    assert (first["id"], second["id"]) == ("a/0", "a/1") and names(second) == [("image", f"a/1.{suffix}")]
    assert import_tar(members, options={"question": "Describe."})[0]["messages"][0]["content"] == [
        IMAGE,
        text("Describe."),
    ]


def test_captions_in_json(import_tar):
    members = {"0.mp4": b"v", "0.json": {"caption": "rain", "url": "u", "alt": "snow"}}
    (row,) = import_tar(members)
    assert row["messages"][1]["content"] == "rain" and names(row) == [("video", "0.mp4")]
    assert row["meta"] == {"url": "u", "alt": "snow"}
    assert import_tar(members, columns={"caption": "alt"})[0]["messages"][1]["content"] == "snow"


def test_text_beside_json_is_the_caption(import_tar):
    (row,) = import_tar({"0.jpg": b"i", "0.json": {"width": 3}, "0.txt": b"a mug"})
    assert row["messages"][1]["content"] == "a mug" and row["meta"] == {"width": 3}


def llava(*asked, **more):
    turns = [{"from": "human", "value": words} for words in asked]
    return {"conversations": [turn for asks in turns for turn in (asks, {"from": "gpt", "value": "A"})], **more}


def test_a_llava_conversation(import_tar):
    (row,) = import_tar({"k.jpg": b"i", "k.json": llava("What?\n<image>", id="x", image="coco/1.jpg")})
    assert row["id"] == "x" and names(row) == [("image", "k.jpg")]
    assert row["messages"][0]["content"] == [IMAGE, text("What?")]
    (row,) = import_tar({"k.json": llava("What is <image>?")})
    assert row["messages"][0]["content"] == "What is <image>?" and row["media"] == []


def test_several_images_are_found_by_name_or_suffix(import_tar):
    members = {"k.1.jpg": b"one", "k.2.jpg": b"two"}
    for wanted in (["k.2.jpg", "k.1.jpg"], ["2.jpg", "1.jpg"], ["some/k.2.jpg", "1.jpg"]):
        (row,) = import_tar(members | {"k.json": llava("<image> or <image>?", image=wanted)})
        assert names(row) == [("image", "k.2.jpg"), ("image", "k.1.jpg")]
    (row,) = import_tar(members | {"k.json": llava("<image> or <image>?")})
    assert names(row) == [("image", "k.1.jpg"), ("image", "k.2.jpg")]
    with pytest.raises(ImportProblem, match="the image '3.jpg', and of the key's members k.1.jpg, k.2.jpg"):
        import_tar(members | {"k.json": llava("<image> or <image>?", image=["1.jpg", "3.jpg"])})


def test_messages(import_tar):
    messages = [
        {"role": "user", "content": [IMAGE, text("What?"), {"type": "audio"}]},
        {"role": "assistant", "content": "A mug."},
    ]
    (row,) = import_tar({"k.json": {"messages": messages}, "k.flac": b"s", "k.png": b"i"})
    assert row["messages"] == messages and names(row) == [("image", "k.png"), ("audio", "k.flac")]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"k.jpg": b"i"}, "members jpg; expected media with txt"),
        ({"k.txt": b"words"}, "members txt; expected"),
        ({"k.jpg": b"i", "k.json": {"a": 1}}, "json with the keys .*a"),
        ({"k.jpg": b"i", "k.json": llava("What?")}, "0 strings <image> in the texts and 1 images"),
        ({"k.json": {"messages": "Q"}}, "messages with `role`"),
    ],
)
def test_problems(import_tar, members, problem):
    with pytest.raises(ImportProblem, match=problem):
        import_tar(members)
