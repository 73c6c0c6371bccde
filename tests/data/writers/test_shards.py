import json

import pyarrow.parquet as pq
import pytest

from mllm.data.indexing.index import open_index
from mllm.data.schema import MediaItem
from mllm.data.sources import Source
from mllm.data.writers.columns import SCHEMA
from mllm.data.writers.parquet_shards import GROUP_BYTES, GROUP_ROWS
from mllm.data.writers.shards import INDEX, write_shards
from mllm.errors import MediaError, OptionError

ASK = [{"type": "image"}, {"type": "text", "text": "What?"}]


@pytest.fixture
def rows(make_row, images):
    return [make_row(ASK, f"Answer {n}.", media=[images[n % 4]], id=str(n), source=f"s{n % 2}") for n in range(600)]


@pytest.mark.parametrize("embed", [True, False])
def test_the_index_reads_shards_with_their_sizes(embed, rows, tmp_path):
    write_shards(rows, tmp_path / "out", embed=embed, media_root=tmp_path)
    index = open_index(Source(tmp_path / "out", media_root=tmp_path), cache_dir=tmp_path / "cache")
    assert index.importer == "mllm" and [row.id for row in index] == [row.id for row in rows]
    assert {(row.media[0].height, row.media[0].width) for row in index} == {(6, 8)}
    assert {row.media[0].blob is not None for row in index} == {embed}


def test_embedded_media_are_the_files_themselves(rows, images, tmp_path):
    write_shards(rows[:5], tmp_path / "out", embed=True)
    wanted = [row.media[0].path.read_bytes() for row in rows[:5]]
    for image in images:
        image.path.unlink()
    index = open_index(Source(tmp_path / "out"), cache_dir=tmp_path / "cache")
    assert [index.media_bytes_of(row.media[0]) for row in index] == wanted


def test_shards_and_row_groups_are_bounded_and_counted(rows, tmp_path):
    report = write_shards(rows, tmp_path / "out", embed=True, max_shard_bytes=40_000)
    files = [pq.ParquetFile(file) for file in report.files]
    groups = [file.metadata.row_group(n) for file in files for n in range(file.num_row_groups)]
    assert len(files) > 1 and all(file.stat().st_size < 44_000 for file in report.files)
    assert max(group.num_rows for group in groups) <= GROUP_ROWS and len(groups) >= 600 / GROUP_ROWS
    assert [file.schema_arrow for file in files] == [SCHEMA] * len(files)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["rows"] == report.written == 600 and index["sources"] == {"s0": 300, "s1": 300}
    assert [(shard["file"], shard["rows"], shard["bytes"]) for shard in index["shards"]] == [
        (path.name, file.metadata.num_rows, path.stat().st_size)
        for path, file in zip(report.files, files, strict=True)
    ]


def test_large_media_make_small_row_groups(make_row, tmp_path):
    path = tmp_path / "noise.png"
    path.write_bytes(bytes(GROUP_BYTES // 3))
    rows = [make_row(ASK, media=[MediaItem("image", path)], id=str(n)) for n in range(7)]
    (file,) = write_shards(rows, tmp_path / "out", embed=True).files
    metadata = pq.ParquetFile(file).metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [2, 2, 2, 1]


def test_no_rows_are_a_shard_without_rows(tmp_path):
    (file,) = write_shards([], tmp_path / "out", embed=True).files
    assert pq.ParquetFile(file).metadata.num_rows == 0


def test_a_failure_leaves_nothing(rows, images, tmp_path):
    images[3].path.unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MediaError, match=r"the image '.*3\.png': No such file"):
        write_shards(rows, tmp_path / "out", embed=True)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_overwritten(rows, tmp_path):
    write_shards(rows[:1], tmp_path / "out", embed=True)
    with pytest.raises(OptionError, match="is there already"):
        write_shards(rows[1:2], tmp_path / "out", embed=True)
    index = open_index(Source(tmp_path / "out"), cache_dir=tmp_path / "cache")
    assert [row.id for row in index] == ["0"]
