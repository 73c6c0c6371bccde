"""Rows -> file -> rows: equal. File -> rows -> file: the same bytes."""

from functools import partial

import pyarrow.parquet as pq
import pytest

from mllm.data.schema import Answer, MediaItem
from mllm.data.writers.llama_factory import write_llama_factory
from mllm.data.writers.llava import write_llava
from mllm.data.writers.ms_swift import write_ms_swift
from mllm.data.writers.shards import write_shards
from mllm.data.writers.trl import write_trl

IMAGE, VIDEO, AUDIO = {"type": "image"}, {"type": "video"}, {"type": "audio"}


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture
def plain_rows(make_row, images):
    """What every form has words for."""
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, text("What?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "And <b>now</b>?\n\nSay so."},
        {"role": "assistant", "content": "Ünïcode 猫\n"},
    ]
    return [
        make_row([IMAGE, text("What is it?")], media=images[:1], id="one"),
        make_row("No picture.", id="text"),
        make_row([IMAGE, text("and "), IMAGE, text("\nalike?")], media=images[:2], id="two"),
        make_row(media=images[2:3], messages=talk, id="talk"),
    ]


@pytest.fixture
def swift_rows(make_row, images, tmp_path):
    """What needs marks for any medium at any place, and weights."""
    movie, sound = MediaItem("video", tmp_path / "v.mp4"), MediaItem("audio", tmp_path / "s.wav")
    flags = [
        {"role": "user", "content": [text("Does "), VIDEO, text(" fit "), AUDIO, text("?")]},
        {"role": "assistant", "content": "Yes."},
    ]
    drawing = [text("First "), IMAGE, text(", then "), IMAGE]
    return [
        make_row(messages=flags, media=[movie, sound], id="kinds"),
        make_row("Draw.", drawing, media=images[:2], id="draw"),
    ]


@pytest.fixture
def pairs(make_row, images):
    one = {"media": images[:1], "chosen": Answer("A cat."), "rejected": Answer("A dog.")}
    return [
        make_row([IMAGE, text("What?")], **one, id="a"),
        make_row("Why?", chosen=Answer("So."), rejected=Answer([text("Not so.")]), id="b"),
    ]


@pytest.fixture
def hard_pairs(make_row, images):
    """Per-side media, contrast media, and both."""
    ask, shared = [IMAGE, text("What?")], images[:1]
    return [
        make_row(ask, media=shared, id="side", chosen=Answer("A cat."), rejected=Answer("A dog.", media=(images[1],))),
        make_row(ask, media=shared, id="same", chosen=Answer("A cat."), rejected=Answer("A cat.", media=(images[1],))),
        make_row(
            ask,
            media=shared,
            id="all",
            chosen=Answer("A cat."),
            rejected=Answer("A dog.", media=(images[2],)),
            contrast=(images[3],),
        ),
    ]


def _llama_factory(rows, out, **options):
    write_llama_factory(rows, out, name="rows", **options)
    return out / "rows.json"


def _file(write, suffix, rows, out, **options):
    write(rows, out.with_suffix(suffix), **options)
    return out.with_suffix(suffix)


def _shards(embed, rows, out, **options):
    write_shards(rows, out, embed=embed, **options)
    return out


def _trl(rows, out, media_root):
    write_trl(rows, out)
    return out


FORMS = {
    "llava": partial(_file, write_llava, ".json"),
    "ms_swift": partial(_file, write_ms_swift, ".jsonl"),
    "llama_factory": _llama_factory,
    "trl": _trl,
    "embedded": partial(_shards, True),
    "paths": partial(_shards, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_answers(form, plain_rows, tmp_path, read_rows, normal):
    _check_round_trip(FORMS[form], plain_rows, tmp_path, read_rows, normal)


@pytest.mark.parametrize("form", ["ms_swift", "llama_factory", "embedded", "paths"])
def test_media_of_any_kind_at_any_place(form, swift_rows, tmp_path, read_rows, normal):
    if form == "embedded":
        swift_rows = [row for row in swift_rows if row.id != "kinds"]  # there is no such file to embed
    _check_round_trip(FORMS[form], swift_rows, tmp_path, read_rows, normal)


@pytest.mark.parametrize("form", ["ms_swift", "llama_factory", "trl", "embedded", "paths"])
def test_pairs(form, pairs, tmp_path, read_rows, normal):
    _check_round_trip(FORMS[form], pairs, tmp_path, read_rows, normal)


@pytest.mark.parametrize("form", ["embedded", "paths"])
def test_our_shards_keep_everything(form, hard_pairs, make_row, images, tmp_path, read_rows, normal):
    whole = make_row("[0.1, 0.2, 0.3, 0.4]", coordinates="unit", meta={"a": [1, None, "ü"]}, id="whole")
    cut = MediaItem("video", images[0].path, frames=9, seconds=3.5, start=0.5, end=2.0, height=6, width=8)
    clip = make_row([VIDEO], media=[cut], id="clip")
    weights = [
        {"role": "assistant", "content": "A", "loss": False},
        {"role": "assistant", "content": "B", "loss": 0.5},
    ]
    weighted = make_row(messages=weights, id="weights")
    rows = [whole, clip, weighted, *hard_pairs]
    read = _check_round_trip(FORMS[form], rows, tmp_path, read_rows, normal)
    assert [row.source for row in read] == ["s"] * len(rows) and read[0].meta == whole.meta
    facts = ("kind", "height", "width", "frames", "seconds", "start", "end")
    assert [getattr(read[1].media[0], name) for name in facts] == [getattr(cut, name) for name in facts]
    assert [type(row) for row in read] == [type(row) for row in rows]


def test_ms_swift_splits_contrast_media_off(hard_pairs, tmp_path, read_rows, normal):
    """The documented normalisation: the contrast of a pair becomes a pair of the same answer under other images."""
    wanted = []
    for row in map(normal, hard_pairs):
        contrast, row["contrast"] = row["contrast"], None
        wanted.append(row)
        if contrast:
            wanted.append(row | {"id": row["id"] + "/contrast", "rejected": (row["chosen"][0], contrast)})
    read = read_rows(FORMS["ms_swift"](hard_pairs, tmp_path / "out", media_root=tmp_path))
    assert [normal(row) for row in read] == wanted
    _check_round_trip(FORMS["ms_swift"], read, tmp_path, read_rows, normal)


def test_ms_swift_keeps_pairs_of_other_media_than_images(make_row, tmp_path, read_rows, normal):
    movies = [MediaItem("video", tmp_path / f"{number}.mp4") for number in range(2)]
    sides = {"chosen": Answer("A cat."), "rejected": Answer("A dog.", media=(movies[1],))}
    rows = [make_row([VIDEO, text("What?")], media=movies[:1], **sides)]
    _check_round_trip(FORMS["ms_swift"], rows, tmp_path, read_rows, normal)


def test_ms_swift_keeps_weights(make_row, tmp_path, read_rows, normal):
    answers = [{"role": "assistant", "content": "A", "loss": loss} for loss in (False, 0.5, True)]
    messages = [part for answer in answers for part in ({"role": "user", "content": "?"}, answer)]
    _check_round_trip(FORMS["ms_swift"], [make_row(messages=messages)], tmp_path, read_rows, normal)


@pytest.mark.parametrize(("coordinates", "box"), [("pixel", "[1, 2, 30, 40.5]"), ("unit", "[0.0, 0.25, 1.0, 0.5]")])
def test_ms_swift_keeps_boxes(coordinates, box, make_row, images, tmp_path, read_rows, normal):
    question = [IMAGE, text("A"), IMAGE, text(f" see {box}")]
    rows = [make_row(question, f"It is at {box}, {box}", media=images[:2], coordinates=coordinates)]
    read = _check_round_trip(FORMS["ms_swift"], rows, tmp_path, read_rows, normal)
    assert read[0].coordinates == coordinates and "bbox_type" in (tmp_path / "first.jsonl").read_text()


@pytest.mark.parametrize("form", ["llava", "ms_swift", "llama_factory"])
def test_embedded_media_become_files(form, plain_rows, tmp_path, read_rows, normal):
    write_shards(plain_rows, tmp_path / "shards", embed=True)
    embedded = read_rows(tmp_path / "shards")
    assert all(item.path is None for row in embedded for item in row.media)
    options = {"embedded": tmp_path / "files"}
    write = {"llava": write_llava, "ms_swift": write_ms_swift, "llama_factory": write_llama_factory}[form]
    if form == "llama_factory":
        (tmp_path / "out").mkdir()
        write(embedded, tmp_path / "out", name="rows", **options)
        out = tmp_path / "out" / "rows.json"
    else:
        out = tmp_path / ("out.jsonl" if form == "ms_swift" else "out.json")
        write(embedded, out, **options)
    read = read_rows(out, media_root=tmp_path if form == "llama_factory" else None)
    assert [normal(row) for row in read] == [normal(row) for row in plain_rows]
    assert {file.suffix for file in (tmp_path / "files").iterdir()} == {".png"}
    assert len(list((tmp_path / "files").iterdir())) == 3  # named by their content


def _check_round_trip(write, rows, root, read_rows, normal):
    """Writes twice, and returns what was read between."""
    first = write(rows, root / "first", media_root=root)
    read = read_rows(first, media_root=root)
    assert [normal(row) for row in read] == [normal(row) for row in rows]
    assert [type(row) for row in read] == [type(row) for row in rows]
    second = write(read, root / "second", media_root=root)
    if first.is_file():
        assert second.read_bytes() == first.read_bytes()
    else:
        tables = [
            [pq.read_table(file).to_pylist() for file in sorted(folder.glob("*.parquet"))]
            for folder in (first, second)
        ]
        assert _without_sources(tables[1]) == _without_sources(tables[0])
    return read


def _without_sources(shards):
    """Names of sources and of embedded files stay behind in some forms: they are for messages alone."""
    rows = [row for shard in shards for row in shard]
    for row in rows:
        row.pop("source")
        for item in [*row.get("images", []), *row.get("media", [])]:
            if item["bytes"]:
                item.pop("path")
            for size in ("height", "width", "frames", "seconds"):
                item.pop(size, None)
    return rows
