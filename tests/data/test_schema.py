from pathlib import Path

import pytest

from mllm.data.schema import parse_row
from mllm.errors import RowError

ROOT = Path("/data")
IMAGE = {"kind": "image", "path": "a.png", "height": 4, "width": 6}
ASK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": "A cat."}


def _row(**changes) -> dict:
    return {"id": "r", "messages": [ASK, ANSWER], "media": [IMAGE]} | changes


def test_a_row():
    row = parse_row(_row(source="s", meta={"split": "a"}), where="f.jsonl, row number 3", root=ROOT)
    assert (row.id, row.source, row.meta) == ("r", "s", {"split": "a"})
    assert row.media[0].path == ROOT / "a.png" and (row.media[0].height, row.media[0].width) == (4, 6)
    assert row.name == "row 'r' (f.jsonl, row number 3)"


def test_a_number_as_id_and_text_alone():
    row = parse_row({"id": 7, "messages": [{"role": "user", "content": "Hi"}, ANSWER]}, where="f", root=ROOT)
    assert row.id == "7" and row.media == ()


def test_text_that_looks_like_a_placeholder_is_text():
    messages = [{"role": "user", "content": "What does <image> mean?"}, ANSWER]
    assert parse_row({"id": "r", "messages": messages}, where="f", root=ROOT).media == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([1], "a list"),
        ({"messages": []}, r"no key \['id'\]"),
        (_row(id=None), "id = None"),
        (_row(answer="x"), r"unknown keys \['answer'\]"),
        (_row(messages=[]), r"messages = \[\]"),
        (_row(messages="Hi"), "messages = 'Hi'"),
        (_row(messages=[{"role": "user"}, ANSWER]), "message 0"),
        (_row(messages=[ASK, {"role": "bot", "content": "x"}]), "message 1: role = 'bot'"),
        (_row(messages=[{"role": "user", "content": ["What?"]}, ANSWER]), "message 0: content"),
        (_row(messages=[{"role": "user", "content": None}, ANSWER]), "message 0: content = None"),
        (_row(messages=[ASK]), "no message of the assistant to learn from"),
        (_row(messages=[ASK, ANSWER | {"loss": False}]), "no message of the assistant to learn from"),
        (_row(media={"path": "a.png"}), "media = {"),
        (_row(media=["a.png"]), "media 0: 'a.png'"),
        (_row(media=[{"kind": "image", "path": "a.png"}]), r"no key \['height', 'width'\]"),
        (_row(media=[IMAGE | {"size": 3}]), r"unknown keys \['size'\]"),
        (_row(media=[IMAGE | {"kind": "audio"}]), "kind = 'audio'"),
        (_row(media=[IMAGE | {"path": 3}]), "path = 3"),
        (_row(media=[IMAGE | {"width": 0}]), r"height, width = \(4, 0\)"),
        (_row(media=[IMAGE | {"width": 6.0}]), r"height, width = \(4, 6.0\)"),
        (_row(media=[IMAGE | {"width": True}]), "height, width"),
        (_row(media=[]), "1 media content items .* and 0 media"),
        (_row(media=[IMAGE, IMAGE]), "1 media content items .* and 2 media"),
    ],
)
def test_malformed_rows(fields, message):
    with pytest.raises(RowError, match=message) as caught:
        parse_row(fields, where="f.jsonl, row number 3", root=ROOT)
    assert "f.jsonl, row number 3" in caught.value.found
    assert caught.value.expected and caught.value.do
