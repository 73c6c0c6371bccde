"""Parquet, Arrow and saved data sets: every cell as it was written, and media findable again."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mllm.data.blobs import read_blob
from mllm.data.importers.base import BadRecord, EmbeddedBytes
from mllm.data.reading import read_tables
from mllm.data.reading.read import read_records
from mllm.data.schema import Blob
from mllm.data.sources import Source

datasets = pytest.importorskip("datasets")


def png(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (3, 2), shade).save(data, "PNG")
    return data.getvalue()


IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def written(path: Path, table: pa.Table, **options) -> list:
    """The records of a table in a file of the kind that the suffix says."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table, **options)
    return list(read_records(Source(path)))


def embedded(value, found):
    """All embedded bytes inside of a value."""
    if isinstance(value, EmbeddedBytes):
        found.append(value)
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            embedded(inner, found)
    return found


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_every_embedded_medium_is_where_its_blob_says(tmp_path, suffix):
    one = [{"bytes": png(n), "path": f"{n}.png"} for n in range(5)]
    table = pa.table(
        {
            "image": pa.array(one, IMAGE),
            "images": pa.array([one[:n] for n in range(5)], pa.list_(IMAGE)),
            "raw": pa.array([png(9 + n) for n in range(5)], pa.binary()),
            "raws": pa.array([[png(19 + n)] for n in range(5)], pa.large_list(pa.large_binary())),
            "media": pa.array(
                [[{"kind": "image", "bytes": png(n), "path": "x"}] for n in range(5)],
                pa.list_(pa.struct({"kind": pa.string(), "bytes": pa.binary(), "path": pa.string()})),
            ),
        }
    )
    options = {"row_group_size": 2} if suffix == ".parquet" else {"max_chunksize": 2}
    records = written(tmp_path / f"a{suffix}", table, **options)
    for number, (record, row) in enumerate(zip(records, table.to_pylist(), strict=True)):
        fields = record.fields
        assert fields["image"].data == row["image"]["bytes"] and fields["image"].name == f"{number}.png"
        assert [item.data for item in fields["images"]] == [item["bytes"] for item in row["images"]]
        assert fields["raw"].data == row["raw"] and [item.data for item in fields["raws"]] == row["raws"]
        assert fields["media"][0]["kind"] == "image" and fields["media"][0]["bytes"].data == png(number)
        for item in embedded(fields, []):
            assert read_blob(Blob(**{**item.blob, "container": Path(item.blob["container"])})) == item.data


def test_media_without_bytes_are_their_path(tmp_path):
    cells = [{"bytes": None, "path": "a/b.png"}, {"bytes": None, "path": None}, None]
    table = pa.table(
        {"image": pa.array(cells, IMAGE), "images": pa.array([cells[:1], cells[1:], None], pa.list_(IMAGE))}
    )
    records = written(tmp_path / "a.parquet", table)
    assert [record.fields for record in records] == [
        {"image": "a/b.png", "images": ["a/b.png"]},
        {"images": [None, None]},
        {},
    ]


def test_media_deep_inside_have_no_blob(tmp_path):
    messages = [[{"role": "user", "content": [{"type": "image", "image": {"bytes": png(1), "path": None}}]}]]
    part = pa.struct({"type": pa.string(), "image": IMAGE})
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(part)}))
    record = written(tmp_path / "a.parquet", pa.table({"messages": pa.array(messages, kind)}))[0]
    item = record.fields["messages"][0]["content"][0]["image"]
    assert item == EmbeddedBytes(png(1), None)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_nulls_are_absent_values_on_all_levels(tmp_path, suffix):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Hi", "index": 0}]
    table = pa.Table.from_pylist(
        [
            {"id": 1, "messages": [{"role": "user", "content": parts}], "image": None, "tags": ["a", None]},
            {"id": None, "messages": None, "image": "a.png", "tags": []},
        ]
    )
    records = written(tmp_path / f"a{suffix}", table)
    clean = [{"type": "image"}, {"type": "text", "text": "Hi", "index": 0}]
    assert [record.fields for record in records] == [
        {"id": 1, "messages": [{"role": "user", "content": clean}], "tags": ["a", None]},
        {"image": "a.png", "tags": []},
    ]
    assert [record.where for record in records] == [f"{tmp_path}/a{suffix}, row {row}" for row in (0, 1)]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_large_rows_are_read_few_at_a_time(tmp_path, monkeypatch, suffix):
    batches = []
    records_of = read_tables._RowReader.records
    monkeypatch.setattr(read_tables, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(
        read_tables._RowReader,
        "records",
        lambda self, batch, row, number: batches.append(len(batch)) or records_of(self, batch, row, number),
    )
    rows = [bytes([n]) * 3000 for n in range(20)]
    table = pa.table({"raw": pa.array(rows, pa.binary())})
    options = {"compression": "none", "use_dictionary": False} if suffix == ".parquet" else {}
    records = written(tmp_path / f"a{suffix}", table, **options)
    assert [record.fields["raw"].data for record in records] == rows
    assert [record.fields["raw"].blob["row"] for record in records] == list(range(20))
    assert sum(batches) == 20 and max(batches) <= 3


def test_a_damaged_row_group_leaves_the_others(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"n": list(range(9)), "text": [f"text number {n} " * 50 for n in range(9)]})
    pq.write_table(table, path, row_group_size=3, use_dictionary=False, compression="zstd", write_statistics=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    records = list(read_records(Source(path)))
    assert [record.fields["n"] for record in records if not isinstance(record, BadRecord)] == [0, 1, 2, 6, 7, 8]
    bad = [record for record in records if isinstance(record, BadRecord)]
    assert [record.where for record in bad] == [f"{path}, rows 3 to 5"]
    assert len({record.number for record in records}) == 7


def test_a_cut_arrow_stream_gives_what_is_whole(tmp_path):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": [f"text number {n} " * 50 for n in range(9)]})
    written(path, table, max_chunksize=3)
    path.write_bytes(path.read_bytes()[:-2000])
    records = list(read_records(Source(path)))
    assert [record.fields["text"] for record in records[:-1]] == table["text"].to_pylist()[:6]
    assert isinstance(records[-1], BadRecord) and records[-1].where == f"{path}, from row 6 on"


def saved():
    rows = {
        "image": [{"bytes": png(1), "path": None}, None],
        "messages": [[{"role": "user", "content": [{"type": "text", "text": "é"}]}], []],
    }
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    message = {"role": datasets.Value("string"), "content": datasets.List(part)}
    return datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "messages": datasets.List(message)})
    )


def test_a_data_set_that_datasets_saved(tmp_path):
    saved().save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": saved(), "test": saved()}).save_to_disk(tmp_path / "splits")
    for source in (Source(tmp_path / "one"), Source(tmp_path / "splits", split="test")):
        records = list(read_records(source))
        assert records[0].fields["image"].data == png(1)
        assert records[0].fields["messages"] == [{"role": "user", "content": [{"type": "text", "text": "é"}]}]
        assert records[1].fields == {"messages": []} and records[1].number == 1
    assert "/test/" in records[0].where


def test_json_columns_are_decoded(tmp_path):
    content = [{"type": "text", "text": "Hi"}, "or a text", {"n": None}]
    table = pa.table({"content": pa.array([json.dumps(content), None], pa.string()).cast(pa.json_())})
    records = written(tmp_path / "a.parquet", table)
    assert [record.fields for record in records] == [{"content": content}, {}]
