from pathlib import Path

import pytest

from mllm.data.schema import Blob, PreferenceRow, has_target_media, media_of, parse_row
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
        (_row(media=[{"path": "a.png"}]), r"no key \['kind'\]"),
        (_row(media=[{"kind": "image"}]), "path = None"),
        (_row(media=[{"kind": "image", "path": "a.png", "height": 4}]), r"height, width = \(4, 0\)"),
        (_row(media=[IMAGE | {"size": 3}]), r"unknown keys \['size'\]"),
        (_row(media=[IMAGE | {"kind": "smell"}]), "kind = 'smell'"),
        (_row(media=[IMAGE | {"kind": "audio"}]), r"\['image'\] and 1 media \['audio'\]"),
        (_row(media=[IMAGE | {"start": -1}]), "start = -1"),
        (_row(media=[IMAGE | {"end": True}]), "end = True"),
        (_row(media=[IMAGE | {"seconds": float("inf")}]), "seconds = inf"),
        (_row(coordinates="inches"), "coordinates = 'inches'"),
        (_row(contrast=[IMAGE]), "contrast without chosen and rejected"),
        (_row(chosen={"content": "A cat."}), "rejected: None"),
        (_row(chosen={"text": "A cat."}, rejected={"content": "A dog."}), r"chosen: no key \['content'\]"),
        (_row(chosen={"content": 3}, rejected={"content": "A dog."}), "chosen: content = 3"),
        (_row(chosen={"content": "x"}, rejected={"content": "y", "media": []}), "rejected, media: 0 media items"),
        (_row(chosen={"content": "x"}, rejected={"content": "y"}, contrast=[IMAGE, IMAGE]), "contrast: 2 media items"),
        (_row(media=[IMAGE | {"path": 3}]), "path = 3"),
        (_row(media=[IMAGE | {"width": 0}]), "width = 0"),
        (_row(media=[IMAGE | {"width": 6.0}]), "width = 6.0"),
        (_row(media=[IMAGE | {"width": True}]), "width = True"),
        (_row(media=[]), "1 media content items .* and 0 media"),
        (_row(media=[IMAGE, IMAGE]), "1 media content items .* and 2 media"),
    ],
)
def test_malformed_rows(fields, message):
    with pytest.raises(RowError, match=message) as caught:
        parse_row(fields, where="f.jsonl, row number 3", root=ROOT)
    assert "f.jsonl, row number 3" in caught.value.found
    assert caught.value.expected and caught.value.do


def test_a_preference_row_and_its_media():
    retrieved = IMAGE | {"path": "retrieved.png"}
    fields = {
        "id": "p",
        "messages": [ASK],
        "media": [IMAGE],
        "chosen": {"content": "A cat."},
        "rejected": {"content": "A dog.", "media": [IMAGE | {"path": "other.png"}]},
        "contrast": [retrieved],
    }
    row = parse_row(fields, where="f", root=ROOT)
    assert isinstance(row, PreferenceRow)
    assert row.chosen.media is None  # read under the row's own
    assert [item.path.name for item in media_of(row)] == [Path(IMAGE["path"]).name, "other.png", "retrieved.png"]


def test_media_may_lie_inside_another_file():
    blob = {"container": "a.tar", "offset": 512, "length": 7}
    (item,) = parse_row(_row(media=[{"kind": "image", "blob": blob}]), where="f", root=ROOT).media
    assert item.path is None
    assert item.blob == Blob(ROOT / "a.tar", offset=512, length=7)


@pytest.mark.parametrize(("loss", "is_target"), [({}, True), ({"loss": False}, False)])
def test_an_image_in_an_answer_that_is_learned_is_a_target(loss, is_target):
    draws = {"role": "assistant", "content": [{"type": "text", "text": "Here:"}, {"type": "image"}], **loss}
    fields = {"id": "d", "messages": [{"role": "user", "content": "Draw."}, draws, ANSWER], "media": [IMAGE]}
    assert has_target_media(parse_row(fields, where="f", root=ROOT)) is is_target
