"""An index holds what the source holds: checked, measured, in its order; and a list of what is broken."""

import base64
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from mllm.data.importers.base import BadRecord, Drop, EmbeddedBytes, Importer, ImportProblem, Record
from mllm.data.indexing.index import RowIndex, open_index
from mllm.data.indexing.index_build import build_index
from mllm.data.schema import PreferenceRow, media_of, parse_row
from mllm.data.sources import Source
from mllm.errors import MediaError, OptionError, RowError
from mllm.testing import save_tiny_rows

ASK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
ANSWER = {"role": "assistant", "content": "A kite."}
TEXT = {"messages": [{"role": "user", "content": "Why?"}, ANSWER], "media": []}


def _image(path: Path, height: int, width: int, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "red").save(path, **options)
    return path


def _picture(name: str, **sizes) -> dict:
    return {"kind": "image", "path": name, **sizes}


def _write(path: Path, *rows: dict | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def opened(tmp_path):
    """Write rows and open their index."""

    def write_and_open(*rows: dict | str, **options) -> RowIndex:
        path = _write(tmp_path / "rows.jsonl", *rows)
        return open_index(Source(path, format="mllm", **options), cache_dir=tmp_path / "cache")

    return write_and_open


def test_rows_are_those_of_the_file(tmp_path):
    path = save_tiny_rows(tmp_path / "rows", 30, num_images=lambda number: number % 4)
    index = open_index(Source(path, format="mllm"), cache_dir=tmp_path / "cache")
    lines = path.read_text().splitlines()
    assert list(index) == [
        parse_row(json.loads(line), where=f"{path}, line {number}", root=path.parent)
        for number, line in enumerate(lines, start=1)
    ]
    assert index.num_bad == 0
    assert index.bad() == []
    for outside in (30, -1):
        with pytest.raises(IndexError):
            index[outside]


def test_every_part_of_a_preference_comes_back(tmp_path, opened):
    names = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        _image(tmp_path / name, 10 + number, 20)
    items = [_picture(name, height=10 + number, width=20) for number, name in enumerate(names)]
    fields = {
        "id": 7,
        "source": "pairs",
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
        "media": items[:2],
        "chosen": {"content": "Yes, Grüße 你好.", "media": items[2:4]},
        "rejected": {"content": [{"type": "text", "text": "No."}]},
        "contrast": items[4:6],
        "coordinates": "unit",
        "meta": {"margin": 0.5, "of": ["a", None], "large": 2**70},
    }
    index = opened(fields)
    assert isinstance(index[0], PreferenceRow)
    assert index[0] == parse_row(fields, where=f"{tmp_path / 'rows.jsonl'}, line 1", root=tmp_path)
    assert index.char_lengths.tolist() == [len("Yes, Grüße 你好.".encode()) + len("No.")]
    without = opened(fields | {"contrast": None, "chosen": {"content": "Yes."}})
    assert without[0].contrast is None
    assert without[0].chosen.media is None


def test_sizes_come_from_headers_upright(tmp_path, opened):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    _image(tmp_path / "a.jpg", 30, 40, exif=exif)
    _image(tmp_path / "b.png", 5, 6)
    index = opened(
        *({"id": name, "messages": [ASK, ANSWER], "media": [_picture(name)]} for name in ("a.jpg", "b.png"))
    )
    assert [(row.media[0].height, row.media[0].width) for row in index] == [(40, 30), (5, 6)]
    rows, heights, widths = index.media_columns("height", "width")
    assert (rows.tolist(), heights.tolist(), widths.tolist()) == ([0, 1], [40, 5], [30, 6])


def test_all_bad_rows_are_named_in_order_and_the_good_ones_keep_their_lines(tmp_path, opened):
    _image(tmp_path / "good.png", 3, 4)
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with_image = {"messages": [ASK, ANSWER]}
    index = opened(
        {"id": "good", **with_image, "media": [_picture("good.png")]},
        "{ broken",
        {"id": "missing", **with_image, "media": [_picture("none.png")]},
        {"id": "html", **with_image, "media": [_picture("page.jpg")]},
        {"id": "other size", **with_image, "media": [_picture("good.png", height=4, width=3)]},
        {"id": "outside", **with_image, "media": [_picture("../../etc/passwd")]},
        {"id": "absolute", **with_image, "media": [_picture("/etc/passwd")]},
        {"id": "loop", **with_image, "media": [_picture("loop.png")]},
        {"id": "nobody answers", "messages": [ASK], "media": [_picture("good.png")]},
        {"id": "half a pair", "messages": [{"role": "user", "content": "\ud800"}, ANSWER], "media": []},
        {"id": "number", "messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}, ANSWER]},
        {"id": "too few", **with_image, "media": []},
        {"id": "last", **TEXT},
        on_bad="quarantine",
        max_bad_rate=1.0,
    )
    path = tmp_path / "rows.jsonl"
    assert [(row.id, row.where) for row in index] == [("good", f"{path}, line 1"), ("last", f"{path}, line 13")]
    assert index.num_bad == 11
    bad = index.bad()
    assert [entry.where.removesuffix(", byte 217") for entry in bad] == [f"{path}, line {n}" for n in range(2, 13)]
    files = ["none.png", "page.jpg", "good.png", "../../etc/passwd", "/etc/passwd", "loop.png"]
    assert [entry.file for entry in bad] == ["", *files, "", "", "", ""]
    by_id = {entry.id: entry.reason for entry in bad}
    assert "does not exist" in by_id["missing"]
    assert "no image of a known type" in by_id["html"]
    assert "is 3 x 4, the row says 4 x 3" in by_id["other size"]
    assert "outside the media root" in by_id["outside"]
    assert "outside the media root" in by_id["absolute"]
    assert "no message of the assistant" in by_id["nobody answers"]
    assert "surrogate" in bad[8].reason
    assert all(entry.reason for entry in bad)
    assert not any(entry.where in entry.reason for entry in bad)


def test_two_bad_files_of_one_row_are_both_named(tmp_path, opened):
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "image"}]}
    row = {"id": "two", "messages": [asked, ANSWER], "media": [_picture("a.png"), _picture("b.png")]}
    index = opened(row, {"id": "good", **TEXT}, on_bad="quarantine", max_bad_rate=0.5)
    assert [entry.file for entry in index.bad()] == ["a.png", "b.png"]
    assert index.num_bad == 1


def test_on_bad_error_tells_all_after_the_whole_source(tmp_path, opened):
    rows = [{"id": n, "messages": [ASK, ANSWER], "media": [_picture(f"{n}.png")]} for n in range(8)]
    with pytest.raises(MediaError, match="8 of 9 rows cannot be used") as caught:
        opened(*rows, {"id": "good", **TEXT})
    assert caught.value.found.count("\n") == 5
    listed = Path(caught.value.do.split("the whole list: ")[1].split(")")[0])
    assert len(listed.read_text().splitlines()) == 8
    with pytest.raises(RowError, match="9 of 9 rows") as caught:  # not only media
        opened(*rows, "broken")
    assert not isinstance(caught.value, MediaError)


def test_the_quarantine_has_a_limit(opened):
    rows = [{"id": n, **TEXT} for n in range(9)]
    assert len(opened(*rows, "broken", on_bad="quarantine", max_bad_rate=0.1)) == 9
    with pytest.raises(RowError, match=r"at most 9\.00% bad rows .*these are 10\.00%"):
        opened(*rows, "broken", on_bad="quarantine", max_bad_rate=0.09)


def test_a_source_in_which_nothing_can_be_read(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(RowError, match="1 of 1 rows"):
        open_index(Source(tmp_path / "rows.jsonl"), cache_dir=tmp_path / "cache")
    with pytest.raises(OptionError, match="is not there"):
        open_index(Source(tmp_path / "none.jsonl"), cache_dir=tmp_path / "cache")


def test_remap_and_media_root(tmp_path, opened):
    for name in ("root/a.png", "far/coco/b.png", "far/other/c.png"):
        _image(tmp_path / name, 7, 8)
    names = ["a.png", "./a.png", "coco/train/b.png", str(tmp_path / "far/other/c.png"), "sub/../a.png"]
    asked = {"role": "user", "content": [{"type": "image"}] * len(names)}
    row = {"id": "r", "messages": [asked, ANSWER], "media": [_picture(name) for name in names]}
    far = str(tmp_path / "far")
    index = opened(
        row,
        media_root=tmp_path / "root",
        remap={"coco": "/nowhere", "coco/train": f"{far}/coco", f"{far}/other": f"{far}/other"},
    )
    files = ["root/a.png", "root/a.png", "far/coco/b.png", "far/other/c.png", "root/a.png"]
    assert [item.path for item in index[0].media] == [tmp_path / file for file in files]


def test_links_inside_the_media_root_may_point_anywhere(tmp_path, opened):
    _image(tmp_path / "far" / "a.png", 2, 3)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "images").symlink_to(tmp_path / "far")
    row = {"id": "r", "messages": [ASK, ANSWER], "media": [_picture("images/a.png")]}
    assert opened(row, media_root=tmp_path / "root")[0].media[0].height == 2


def test_equal_rows_have_equal_keys_and_other_rows_others(tmp_path):
    keys = {}
    for name, height, text in (("one", 4, "a"), ("same", 4, "a"), ("taller", 5, "a"), ("said", 4, "b")):
        _image(tmp_path / name / "a.png", height, 9)
        ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        row = {"id": "r", "messages": [ask, ANSWER], "media": [_picture("a.png")]}
        path = _write(tmp_path / name / "rows.jsonl", row)
        keys[name] = open_index(Source(path, format="mllm"), cache_dir=tmp_path / "cache").key
    assert keys["one"] == keys["same"]
    assert len(set(keys.values())) == 3
    assert int(keys["one"], 16) >= 0


def test_an_index_sent_to_another_process_reads_the_same(tmp_path):
    path = save_tiny_rows(tmp_path / "rows", 5)
    index = open_index(Source(path, format="mllm"), cache_dir=tmp_path / "cache")
    sent = pickle.dumps(index)
    assert len(sent) < 5_000
    assert list(pickle.loads(sent)) == list(index)


def test_rows_over_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm.data.indexing.index_build.CHUNK_ROWS", 7)
    seen = []
    path = save_tiny_rows(tmp_path / "rows", 30)
    index = open_index(Source(path, format="mllm"), cache_dir=tmp_path / "cache", progress=seen.append)
    assert [row.id for row in index] == [f"row-{number}" for number in range(30)]
    assert index.column("number").tolist() == list(range(30))
    assert index.char_lengths.dtype == np.int32
    assert sum(seen) == 30
    rows, _ = index.media_columns("height")
    assert rows.tolist() == [number for number, row in enumerate(index) for _ in row.media]


def _built(tmp_path: Path, convert, *records) -> RowIndex:
    directory = tmp_path / "home" / "index-1"
    directory.mkdir(parents=True)
    source = Source(tmp_path, media_root=tmp_path)
    importer = Importer("test", "", matches=lambda fields, source: True, convert=convert)
    build_index(records, importer, source, media_root=tmp_path, directory=directory)
    return RowIndex(directory, source)


def test_drops_are_counted_by_reason_and_problems_listed(tmp_path):
    def convert(record, source):
        if record.fields == "drop":
            raise Drop("no answer")
        if record.fields == "problem":
            raise ImportProblem("two images; expected one")
        yield {"id": record.fields["no such key"], **TEXT}

    records = [Record(fields, f"r{n}", n) for n, fields in enumerate(["drop", "problem", {"id": 5}, "drop"])]
    index = _built(tmp_path, convert, *records, BadRecord("r4", "cut off", 4))
    assert dict(index.dropped) == {"no answer": 2}
    assert [(bad.id, bad.where) for bad in index.bad()] == [("", "r1"), ("5", "r2"), ("", "r4")]
    assert "KeyError: 'no such key'" in index.bad()[1].reason


@pytest.mark.parametrize("remembered", [1_000_000, 0])
def test_embedded_bytes_without_a_place_are_kept_in_the_index(tmp_path, remembered, monkeypatch):
    monkeypatch.setattr("mllm.data.indexing.media_probes.REMEMBERED", remembered)
    monkeypatch.setattr("mllm.data.indexing.index_build.CHUNK_ROWS", 2)

    def png(height, width):
        buffer = io.BytesIO()
        Image.new("RGB", (width, height)).save(buffer, "PNG")
        return buffer.getvalue()

    def convert(record, source):
        data = EmbeddedBytes(base64.b64decode(record.fields), name=f"image {record.number}")
        yield {"id": record.number, "messages": [ASK, ANSWER], "media": [{"kind": "image", "bytes": data}]}

    pictures = [png(3, 4), b"no picture", png(5, 6)]
    records = [Record(base64.b64encode(data).decode(), f"r{n}", n) for n, data in enumerate(pictures)]
    index = _built(tmp_path, convert, *records)
    assert [(row.id, row.media[0].height, row.media[0].width) for row in index] == [("0", 3, 4), ("2", 5, 6)]
    assert [index.media_bytes_of(row.media[0]) for row in index] == [pictures[0], pictures[2]]
    assert [bad.file for bad in index.bad()] == ["image 1"]
    assert all(item.path is None for row in index for item in media_of(row))


def test_files_are_looked_at_once(tmp_path, opened, monkeypatch):
    _image(tmp_path / "a.png", 3, 4)
    looked = []
    from mllm.data.indexing import media_probes

    probe = media_probes.probe_media
    monkeypatch.setattr(media_probes, "probe_media", lambda *args: looked.append(args[1]) or probe(*args))
    index = opened(*({"id": n, "messages": [ASK, ANSWER], "media": [_picture("a.png")]} for n in range(50)))
    assert len(index) == 50
    assert looked == [tmp_path / "a.png"]
    assert os.fspath(index[49].media[0].path) == str(tmp_path / "a.png")
