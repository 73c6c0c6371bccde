"""OpenAI's chat form: media inside of the parts."""

import base64

import pytest

from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import EmbeddedBytes, ImportProblem, Record
from mllm.data.sources import Source

SOURCE = Source("data.jsonl")
DATA = base64.b64encode(b"\x89PNG bytes").decode()


def text(words):
    return {"type": "text", "text": words}


def image(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": None}}


def chat(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "A."}]}


def convert(fields):
    (row,) = IMPORTERS["openai"].convert(Record(fields, "data.jsonl, line 1", 0), SOURCE)
    return row


def test_paths(import_rows, tmp_path):
    fields = chat(text("Is <image> "), image("images/a.png"), text(" the same?"), image("b.png"))
    (row,) = import_rows([fields | {"id": "x"}], "data.jsonl")
    kinds = [{"type": "image"}] * 2
    assert row.messages[0]["content"] == [text("Is <image> "), kinds[0], text(" the same?"), kinds[1]]
    assert [item.path for item in row.media] == [tmp_path / "images/a.png", tmp_path / "b.png"]


def test_other_ways_to_write_a_path():
    parts = [{"type": "image_url", "image_url": "a.png"}, image("file:///data/b%20c.png")]
    parts += [
        {"type": "video_url", "video_url": {"url": "v.mp4"}},
        {"type": "audio_url", "audio_url": {"url": "s.wav"}},
    ]
    assert convert(chat(*parts))["media"] == [
        {"kind": "image", "path": "a.png"},
        {"kind": "image", "path": "/data/b c.png"},
        {"kind": "video", "path": "v.mp4"},
        {"kind": "audio", "path": "s.wav"},
    ]


def test_base64():
    row = convert(
        chat(
            image(f"data:image/png;base64,{DATA}"),
            {"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}},
        )
    )
    assert row["media"] == [
        {"kind": "image", "bytes": EmbeddedBytes(b"\x89PNG bytes", None, "data:image/png;base64")},
        {"kind": "audio", "bytes": EmbeddedBytes(b"\x89PNG bytes", None, "input_audio")},
    ]
    assert row["messages"][0]["content"] == [{"type": "image"}, {"type": "audio"}]


def test_roles_and_weights():
    fields = {
        "messages": [
            {"role": "developer", "content": "S"},
            {"role": "user", "content": [image("a"), text("Q")]},
            {"role": "assistant", "content": [text("A")], "weight": 0},
            {"role": "user", "content": "R"},
            {"role": "assistant", "content": "B", "weight": 1},
        ]
    }
    messages = convert(fields)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message.get("loss") for message in messages] == [None, None, 0, None, 1]


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (image("https://example.org/a.png"), "remote file 'https://example.org/a.png'.*download it first"),
        (image("s3://bucket/a.png"), "download it first"),
        (image("data:image/png;base64,@@@"), "cannot be decoded"),
        (image("data:image/svg+xml,<svg/>"), "expected data in base64"),
        (image(None), "image_url = "),
        (image(""), "image_url = "),
        ({"type": "image_url"}, "image_url = None"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "expected type text"),
        ({"type": "text", "text": 3}, "text = 3"),
        ({"type": "refusal", "refusal": "No."}, "expected type text"),
        ("Q", "a part 'Q'"),
    ],
)
def test_problems(part, problem):
    with pytest.raises(ImportProblem, match=problem):
        convert(chat(image("a.png"), part))


def test_recognised_with_texts_around():
    records = [Record(fields, "", 0) for fields in (chat(text("Q")), chat(image("a")))]
    plain = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    assert detect_format([records[1], Record(plain, "", 1)], SOURCE).name == "openai"
    for odd in (None, [], {}, {"messages": [1]}, {"messages": [{"role": "user", "content": [None, 3]}]}):
        assert not IMPORTERS["openai"].matches(odd, SOURCE)
