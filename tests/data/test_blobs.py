"""Embedded media come back byte by byte from wherever they lie."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm.data.blobs import read_blob, read_media_bytes
from mllm.data.schema import Blob, MediaItem
from mllm.errors import MediaError

PICTURES = [bytes([number]) * (number + 1) for number in range(10)]
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def _table() -> pa.Table:
    cells = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(PICTURES)]
    return pa.table(
        {
            "image": pa.array(cells, STRUCT),
            "images": pa.array([[cells[number - 1], cell] for number, cell in enumerate(cells)], pa.list_(STRUCT)),
            "raw": pa.array(PICTURES, pa.large_binary()),
            "text": [str(number) for number in range(10)],
        }
    )


def _parquet(path: Path) -> None:
    pq.write_table(_table(), path, row_group_size=3)


def _arrow_file(path: Path) -> None:
    with pa.ipc.new_file(str(path), _table().schema) as file:
        file.write_table(_table(), max_chunksize=4)


def _arrow_stream(path: Path) -> None:
    with pa.ipc.new_stream(str(path), _table().schema) as file:
        file.write_table(_table(), max_chunksize=4)


@pytest.mark.parametrize("write", [_parquet, _arrow_file, _arrow_stream])
def test_every_cell_of_a_table(tmp_path, write):
    path = tmp_path / "table"
    write(path)
    for row, data in enumerate(PICTURES):
        assert read_blob(Blob(path, column="image", row=row)) == data
        assert read_blob(Blob(path, column="raw", row=row)) == data
        assert read_blob(Blob(path, column="images", row=row, position=1)) == data
        assert read_blob(Blob(path, column="images", row=row, position=0)) == PICTURES[row - 1]


def test_members_of_a_tar(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(PICTURES):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path) as tar:
        places = [(member.offset_data, member.size) for member in tar]
    for (offset, length), data in zip(places, PICTURES, strict=True):
        item = MediaItem("image", None, blob=Blob(path, offset, length))
        assert read_media_bytes(item) == data


def test_a_file_of_its_own_is_handed_on_unread(tmp_path):
    assert read_media_bytes(MediaItem("image", tmp_path / "none.png")) == tmp_path / "none.png"
    with pytest.raises(MediaError, match="without a file"):
        read_media_bytes(MediaItem("image", None))


def test_a_replaced_table_is_not_answered_from_memory(tmp_path):
    path = tmp_path / "table"
    _parquet(path)
    blob = Blob(path, column="raw", row=1)
    assert read_blob(blob) == PICTURES[1]
    new = tmp_path / "new"
    pq.write_table(pa.table({"raw": [b"a", b"b"]}), new)
    new.replace(path)
    assert read_blob(blob) == b"b"


@pytest.mark.parametrize(
    "place",
    [
        {"column": "image", "row": 10},
        {"column": "image", "row": -1},
        {"column": "none", "row": 1},
        {"column": "images", "row": 1, "position": 2},
        {"column": "text", "row": 1},
        {"offset": 10**9, "length": 5},
        {"offset": 0, "length": 10**9},
        {"offset": -5, "length": 5},
        {},
    ],
)
def test_a_place_that_holds_nothing_is_named(tmp_path, place):
    path = tmp_path / "table"
    _parquet(path)
    with pytest.raises(MediaError, match="table, .*no media there"):
        read_blob(Blob(path, **place))
    path.unlink()
    with pytest.raises(MediaError, match="no media there"):
        read_blob(Blob(path, **place))
