"""RLAIF-V's parquet, from a hand-written miniature with the columns of its card."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import Drop, ImportProblem, Record
from mllm.data.reading.read import read_records
from mllm.data.sources import Source

ROW = {
    "ds_name": "RLAIF-V",
    "image": {"bytes": b"\xff\xd8\xffone", "path": "1.jpg"},
    "question": "What is <image> on the plate?",
    "chosen": "Two eggs.",
    "rejected": "Three eggs.",
    "origin_dataset": "COCO",
    "origin_split": '{"model": "a"}',
    "idx": "17",
    "image_path": "1.jpg",
}


def convert(row):
    return list(IMPORTERS["rlaif_v"].convert(Record(row, "f", 3), Source("f")))


def test_the_published_parquet(tmp_path):
    rows = [ROW, {**ROW, "idx": "18", "question": "And here?"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "RLAIF-V-Dataset_000.parquet")
    source = Source(tmp_path)
    records = list(read_records(source))
    importer = detect_format(records, source)
    assert importer.name == "rlaif_v"
    first, second = (row for record in records for row in importer.convert(record, source))
    assert first["id"] == "17" and second["id"] == "18"
    assert first["messages"] == [  # the string in the question is what somebody wrote, not the image's place
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What is <image> on the plate?"}],
        }
    ]
    assert (first["chosen"], first["rejected"]) == ({"content": "Two eggs."}, {"content": "Three eggs."})
    assert first["media"][0]["kind"] == "image" and first["media"][0]["bytes"].data == b"\xff\xd8\xffone"
    assert first["media"][0]["bytes"].blob["row"] == 0 and second["media"][0]["bytes"].blob["row"] == 1
    assert first["meta"] == {key: ROW[key] for key in ("ds_name", "origin_dataset", "origin_split", "image_path")}


def test_without_an_idx_the_place_names_the_row():
    assert convert({key: value for key, value in ROW.items() if key != "idx"})[0]["id"] == "00000003"


def test_what_is_no_pair():
    with pytest.raises(Drop, match="both answers are the same"):
        convert({**ROW, "rejected": "Two eggs."})
    for wrong in ({"chosen": " "}, {"rejected": None}, {"question": 3}, {"image": 7}):
        with pytest.raises(ImportProblem, match=f"{next(iter(wrong))} = .*expected"):
            convert({**ROW, **wrong})
