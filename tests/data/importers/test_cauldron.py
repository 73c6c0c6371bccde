"""The Cauldron and FineVision in real parquet files."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mllm.data.blobs import read_blob
from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import Drop, ImportProblem, Record
from mllm.data.reading.read import read_records
from mllm.data.schema import Blob
from mllm.data.sources import Source
from mllm.errors import OptionError

IMAGE = {"type": "image"}


def png(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (3, 2), shade).save(data, "PNG")
    return data.getvalue()


def text(words):
    return {"type": "text", "text": words}


def parquet(path: Path, rows: list[dict]) -> Path:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.Table.from_pylist(rows)
    images = pa.array([row["images"] for row in rows], pa.list_(image))
    pq.write_table(table.set_column(table.schema.get_field_index("images"), "images", images), path, row_group_size=1)
    return path


def converted(path, **options):
    source = Source(path, options=options)
    records = list(read_records(source))
    importer = detect_format(records, source)
    assert importer.name == "cauldron"
    return [row for record in records for row in importer.convert(record, source)]


def test_the_cauldron(tmp_path):
    turns = [
        {"user": "Question: <image>?\nChoices: A.", "assistant": "Answer: A", "source": "AI2D"},
        {"user": "And now?", "assistant": "B", "source": "AI2D"},
    ]
    rows = [
        {"images": [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}], "texts": turns},
        {"images": [], "texts": turns[1:]},
    ]
    path = parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    pair, words = converted(path)
    assert (pair["id"], pair["source"]) == ("00000000", "AI2D")
    assert [message["content"] for message in pair["messages"]] == [
        [IMAGE, IMAGE, text("Question: <image>?\nChoices: A.")],
        "Answer: A",
        "And now?",
        "B",
    ]
    for item, shade in zip(pair["media"], (1, 2), strict=True):
        blob = item["bytes"].blob
        assert read_blob(Blob(**{**blob, "container": Path(blob["container"])})) == png(shade)
    assert words["media"] == [] and words["messages"][0]["content"] == "And now?"


FINEVISION = {
    "texts": [{"assistant": "A", "user": "Q"}, {"assistant": "B", "user": "R"}],
    "source": "chart",
    "relevance_ratings": [5, 2],
    "relevance_min": 2,
    "formatting_ratings": [None, 1],
    "formatting_min": 1,
}


def test_ratings_of_finevision(tmp_path):
    rows = [FINEVISION | {"images": [{"bytes": png(1), "path": "x.png"}]}]
    path = parquet(tmp_path / "a.parquet", rows)
    (row,) = converted(path)
    assert len(row["messages"]) == 4 and row["source"] == "chart" and "meta" not in row
    (row,) = converted(path, min_relevance=3)
    assert [message["content"] for message in row["messages"]] == [[IMAGE, text("Q")], "A"]
    assert row["meta"] == {"left_out": {"turn rated below min_relevance = 3": 1}}
    (row,) = converted(path, min_formatting=2)  # a turn without a rating stays
    assert len(row["messages"]) == 2
    with pytest.raises(Drop, match="turn rated below min_relevance = 6"):
        converted(path, min_relevance=6)
    with pytest.raises(OptionError, match="min_relevance = 'good'"):
        converted(path, min_relevance="good")
    with pytest.raises(OptionError, match="options min_beauty"):
        converted(path, min_beauty=3)


def test_images_move_to_the_first_turn_that_is_left():
    fields = FINEVISION | {"images": ["a.png"], "relevance_ratings": [1, 5]}
    (row,) = IMPORTERS["cauldron"].convert(Record(fields, "", 0), Source("a", options={"min_relevance": 3}))
    assert row["messages"][0]["content"] == [IMAGE, text("R")]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"images": ["a"], "texts": []}, "no `texts`"),
        ({"images": ["a"], "texts": [{"user": "Q", "assistant": None}]}, "assistant = None"),
        ({"images": [None], "texts": [{"user": "Q", "assistant": "A"}]}, "image = None"),
    ],
)
def test_problems(fields, problem):
    with pytest.raises(ImportProblem, match=problem):
        list(IMPORTERS["cauldron"].convert(Record(fields, "", 0), Source("a")))


def test_odd_records_are_not_recognised():
    for odd in (None, 3, [], {}, {"texts": None}, {"texts": []}, {"texts": ["a"]}, {"images": []}):
        assert not IMPORTERS["cauldron"].matches(odd, Source("a"))
