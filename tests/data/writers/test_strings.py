"""What forms with strings such as `<image>` cannot say is an error, or skipped and counted; never said otherwise."""

import json

import pytest

from mllm.data.schema import Answer, MediaItem
from mllm.data.writers.llama_factory import write_llama_factory
from mllm.data.writers.llava import write_llava
from mllm.data.writers.ms_swift import write_ms_swift
from mllm.errors import OptionError, RowError

IMAGE = {"type": "image"}


def _write(form, rows, tmp_path, **options):
    if form == "llama_factory":
        return write_llama_factory(rows, tmp_path / "out", name="rows", **options)
    write, name = {"llava": (write_llava, "out.json"), "ms_swift": (write_ms_swift, "out.jsonl")}[form]
    return write(rows, tmp_path / name, **options)


def _text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize("form", ["llava", "llama_factory", "ms_swift"])
@pytest.mark.parametrize("place", ["question", "answer"])
def test_a_literal_placeholder_beside_media(form, place, make_row, images, tmp_path):
    words = {"question": "What?", "answer": "A cat."} | {place: "What does <image> mean?"}
    rows = [make_row([IMAGE, _text(words["question"])], words["answer"], media=images[:1]), make_row(id="good")]
    with pytest.raises(RowError, match="row 'r' .here.: literal <image> in a text"):
        _write(form, rows, tmp_path)
    assert not list(tmp_path.glob("out*/*.json*")) and not list(tmp_path.glob("out*.json*"))
    report = _write(form, rows, tmp_path, on_unsayable="skip")
    assert report.written == 1 and report.skipped == {"literal <image> in a text": 1}


def test_a_literal_placeholder_without_media(make_row, tmp_path, read_rows):
    """LLaVA's form takes it for words. The others count it."""
    rows = [make_row("What does <image> mean?")]
    _write("llava", rows, tmp_path)
    (row,) = read_rows(tmp_path / "out.json")
    assert row.messages[0]["content"] == "What does <image> mean?"
    for form in ("llama_factory", "ms_swift"):
        with pytest.raises(RowError, match="literal <image>"):
            _write(form, rows, tmp_path)


def test_llama_factory_is_one_kind_of_rows(make_row, images, tmp_path):
    pair = make_row(id="pair", chosen=Answer("A"), rejected=Answer("B"))
    side = make_row([IMAGE], media=images[:1], chosen=Answer("A"), rejected=Answer("B", media=(images[1],)))
    report = _write("llama_factory", [pair, make_row(), side], tmp_path, on_unsayable="skip")
    assert report.written == 1 and sorted(report.skipped.values()) == [1, 1]
    assert "media of one side of a preference" in report.skipped


def test_llama_factory_entries_stand_side_by_side(make_row, tmp_path):
    pair = make_row(chosen=Answer("A"), rejected=Answer("B"), contrast=())
    write_llama_factory([make_row()], tmp_path, name="answers")
    report = write_llama_factory([pair], tmp_path, name="pairs")
    entries = json.loads((tmp_path / "dataset_info.json").read_text())
    assert [(name, entry.get("ranking")) for name, entry in entries.items()] == [("answers", None), ("pairs", True)]
    assert report.lost == {"contrast media": 1}
    with pytest.raises(OptionError, match="has an entry 'pairs'"):
        write_llama_factory([pair], tmp_path, name="pairs")


@pytest.mark.parametrize(
    ("forms", "reason", "changes"),
    [
        (["llava"], "a preference", {"chosen": Answer("A"), "rejected": Answer("B")}),
        (["llava"], "audio", {"kinds": ["audio"]}),
        (["llava"], "images and videos in one row", {"kinds": ["image", "video"]}),
        (["llava"], "media in a message of the assistant", {"kinds": ["image"], "at": "answer"}),
        (["llava"], "the only medium of a turn behind words", {"kinds": ["image"], "at": "behind"}),
        (["llava", "llama_factory"], "turns that are not", {"roles": ["user", "user", "assistant"]}),
        (["llava", "llama_factory"], "turns that are not", {"roles": ["assistant"]}),
        (["llama_factory"], "turns that are not", {"roles": ["user", "assistant", "user"]}),
        (["llava", "llama_factory"], "`loss` of its own", {"loss": False}),
        (["llava", "llama_factory", "ms_swift"], "a cut of an audio or video file", {"kinds": ["video"], "end": 2.0}),
        (["ms_swift"], "literal <bbox>", {"answer": "<bbox>"}),
        (["ms_swift"], "two sides that are the same", {"chosen": Answer("A"), "rejected": Answer("A")}),
        (["ms_swift", "llama_factory"], "media in an answer", {"chosen": Answer([IMAGE]), "rejected": Answer("A")}),
    ],
)
def test_what_forms_cannot_say(forms, reason, changes, make_row, tmp_path):
    row = _row(make_row, tmp_path, **changes)
    for form in forms:
        with pytest.raises(RowError, match=reason):
            _write(form, [row], tmp_path)


def _row(make_row, tmp_path, *, kinds=(), at="question", end=None, roles=(), loss=None, answer="A cat.", **sides):
    media = [MediaItem(kind, tmp_path / f"{kind}.bin", end=end) for kind in kinds]
    shown = [{"type": kind} for kind in kinds]
    shown = [_text("Look: "), *shown] if at == "behind" else [*shown, _text("What?")]
    if roles:
        return make_row(messages=[{"role": role, "content": "x"} for role in roles])
    if at == "answer":
        return make_row("Draw.", shown, media=media)
    row = make_row(shown, answer, media=media, **sides)
    if loss is not None:
        row.messages[-1]["loss"] = loss
    return row


def test_llava_counts_the_blanks_it_takes(make_row, images, tmp_path):
    rows = [make_row([IMAGE, _text(" What? ")], media=images[:1]), make_row(" No picture. ")]
    assert _write("llava", rows, tmp_path).lost == {"blanks around the words of a turn": 1}


def test_boxes_that_would_change_their_digits_stay_words(make_row, images, tmp_path, read_rows):
    rows = [make_row([IMAGE, _text("See [0.50, 0.25, 1.0, 1.0]")], media=images[:1], coordinates="unit")]
    assert _write("ms_swift", rows, tmp_path).lost == {"coordinates": 1}
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert row.messages[0]["content"][1]["text"] == "See [0.50, 0.25, 1.0, 1.0]" and row.coordinates == ""


def test_media_outside_the_root_keep_their_whole_path(make_row, images, tmp_path):
    rows = [make_row([IMAGE], media=images[:1])]
    write_llava(rows, tmp_path / "a.json", media_root=tmp_path / "images")
    write_llava(rows, tmp_path / "b.json", media_root=tmp_path / "elsewhere")
    assert json.loads((tmp_path / "a.json").read_text())[0]["image"] == "0.png"
    assert json.loads((tmp_path / "b.json").read_text())[0]["image"] == str(images[0].path)


def test_no_rows_are_an_empty_list(tmp_path):
    write_llava([], tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == []


def test_only_two_ways_with_what_cannot_be_said(make_row, tmp_path):
    with pytest.raises(OptionError, match="on_unsayable = 'drop'"):
        write_llava([make_row()], tmp_path / "a.json", on_unsayable="drop")
