"""RLHF-V's parquet, whose `text` is JSON, and the TSV of its code, from hand-written miniatures."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import ImportProblem, Record
from mllm.data.reading.read import read_records
from mllm.data.sources import Source

SAID = {"question": "Describe it.", "chosen": "A red bus.", "rejected": "A red bus and a dog."}
ROW = {
    "ds_name": "RLHF-V",
    "image": {"bytes": b"\xff\xd8\xffone", "path": "1.jpg"},
    "text": json.dumps(SAID),
    "origin_dataset": "LVIS",
    "origin_split": '{"model": "a", "type": "detailed_description"}',
    "idx": 5,
    "image_path": "1.jpg",
}


def rows_of(source):
    records = list(read_records(source))
    importer = detect_format(records, source)
    assert importer.name == "rlhf_v"
    return [row for record in records for row in importer.convert(record, source)]


def check(row):
    assert row["id"] == "5"
    assert row["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]}
    ]
    assert (row["chosen"], row["rejected"]) == ({"content": "A red bus."}, {"content": "A red bus and a dog."})
    assert row["media"][0]["bytes"].data == b"\xff\xd8\xffone" and row["media"][0]["bytes"].name == "1.jpg"
    assert row["meta"]["origin_split"] == ROW["origin_split"] and "text" not in row["meta"]


def test_the_published_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "RLHF-V-Dataset.parquet")
    (row,) = rows_of(Source(tmp_path / "RLHF-V-Dataset.parquet"))
    check(row)


def test_the_tsv_of_its_code(tmp_path):
    cells = {
        **ROW,
        "image": encode(b"\xff\xd8\xffone"),
        "text": encode(json.dumps(list(SAID.values())).encode()),
        "origin_split": encode(ROW["origin_split"].encode()),
    }
    lines = ["\t".join(cells), "\t".join(str(cell) for cell in cells.values())]
    (tmp_path / "data-1.tsv").write_text("\n".join(lines) + "\n")
    (row,) = rows_of(Source(tmp_path / "data-1.tsv"))
    check(row)


@pytest.mark.parametrize("text", ["A red bus.", "[1, 2]", None, '{"question": "Describe it.", "chosen": "A bus."}'])
def test_a_text_that_is_no_pair(text):
    with pytest.raises(ImportProblem, match="text = |rejected = "):
        list(IMPORTERS["rlhf_v"].convert(Record({**ROW, "text": text}, "f", 0), Source("f")))


def encode(data):
    return base64.b64encode(data).decode()
