"""One source, whatever its files: kinds are told from the bytes, records are numbered through."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm.data.importers.base import BadRecord
from mllm.data.reading.read import read_records
from mllm.data.sources import Source


def test_records_are_numbered_through_the_files_bad_ones_included(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 0}\n{"n": \n{"n": 2}\n')
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.jsonl").write_text('{"n": 4}\n')
    records = list(read_records(Source(tmp_path)))
    assert [record.number for record in records] == [0, 1, 2, 3, 4]
    assert [record.fields["n"] for record in records if not isinstance(record, BadRecord)] == [0, 2, 4]


def test_a_kind_is_told_from_the_bytes(tmp_path):
    table = pa.table({"n": [1]})
    pq.write_table(table, tmp_path / "parquet.json")
    with pa.ipc.new_file(str(tmp_path / "arrow.json"), table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "stream.json"), table.schema) as file:
        file.write_table(table)
    for name in ("parquet", "arrow", "stream"):
        assert [record.fields for record in read_records(Source(tmp_path / f"{name}.json"))] == [{"n": 1}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"\x1f\x8b\x08\x00", "a gzip file: unpack it first"),
        ("a.tar", b"PK\x03\x04rest", "a zip file: unpack it first"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("a.json", "[]".encode("utf-16"), "UTF-16"),
        ("a.parquet", b"", "the file is empty"),
        ("a.parquet", b"<html>", "no readable parquet file"),
        ("a.parquet", b"PAR1" + bytes(64), "no readable parquet file"),
        ("a.arrow", b"ARROW1\0\0" + bytes(64), "damaged"),
        ("a.arrow", b"no arrow at all", "damaged"),
        ("a.tar", b"no tar at all", "a damaged or cut tar"),
        ("a.csv", b"\n\n", "the file is empty"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_bad_record(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    records = list(read_records(Source(tmp_path / name)))
    assert len(records) == 1 and isinstance(records[0], BadRecord)
    assert reason in records[0].reason and str(tmp_path / name) in records[0].where


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "a.json").chmod(0)
    records = list(read_records(Source(tmp_path / "a.json")))
    assert "Permission denied" in records[0].reason


def test_columns_of_a_csv_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefffile_name,caption\na.wav,"Wind, and\nrain"\n\nb.wav,é\n'.encode())
    records = list(read_records(Source(path)))
    assert [record.fields for record in records] == [
        {"file_name": "a.wav", "caption": "Wind, and\nrain"},
        {"file_name": "b.wav", "caption": "é"},
    ]
    assert [record.where for record in records] == [f"{path}, line 2", f"{path}, line 5"]


def test_bad_lines_of_a_tsv_file(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"a\tb\n1\t2\n3\n4\t\xff\n5\t6\t7\n8\t9\n")
    records = list(read_records(Source(path)))
    assert [getattr(record, "fields", None) for record in records] == [
        {"a": "1", "b": "2"},
        None,
        None,
        None,
        {"a": "8", "b": "9"},
    ]
    assert [record.reason for record in records[1:4]] == [
        "1 cells; expected 2: a, b",
        "bytes that are no UTF-8",
        "3 cells; expected 2: a, b",
    ]


def test_a_first_line_that_names_no_columns(tmp_path):
    image = "iVBORw0KGgo" * 20_000  # more than the 131,072 letters that `csv` takes by default
    for lines in ([["1", image], ["2", image]], [["1", ""], ["2", "x"]], [["1", "1"], ["2", "x"]]):
        (tmp_path / "a.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
        assert [record.fields for record in read_records(Source(tmp_path / "a.tsv"))] == lines


def test_a_missing_quote_does_not_swallow_the_file_in_silence(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n1,"2\n3,4\n5,6\n')
    records = list(read_records(Source(tmp_path / "a.csv")))
    assert [type(record) for record in records] == [BadRecord] and "is a quote missing?" in records[0].reason


def test_an_entry_of_a_dataset_info(tmp_path):
    rows = [{"instruction": "Hi", "output": "Hello"}]
    (tmp_path / "demo.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"demo": {"file_name": "demo.json"}}))
    for source in (
        Source(tmp_path / "dataset_info.json", subset="demo"),
        Source(f"{tmp_path}/dataset_info.json#demo"),
    ):
        assert [record.fields for record in read_records(source)] == rows
