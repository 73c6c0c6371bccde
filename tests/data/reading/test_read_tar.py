"""WebDataset tars: grouped by key, found again by byte range, nothing written."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from mllm.data.blobs import read_blob
from mllm.data.importers.base import BadRecord, EmbeddedBytes
from mllm.data.reading.read import read_records
from mllm.data.schema import Blob
from mllm.data.sources import Source


def write(path: Path, members: dict[str, bytes], *links: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for link in links:
            tar.addfile(link)
    return path


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def read(path: Path):
    return list(read_records(Source(path)))


def test_members_are_grouped_by_key(tmp_path):
    long = "d/" + "long" * 60
    path = write(
        tmp_path / "a.tar",
        {
            "./x/1.jpg": b"one",
            "./x/1.seg.PNG": b"mask",
            "./x/1.txt": "é".encode(),
            "y/1.jpg": b"two",
            "y/1.json": json.dumps({"a": [1]}).encode(),
            f"{long}.jpg": b"three",
        },
    )
    records = read(path)
    assert [record.fields["__key__"] for record in records] == ["./x/1", "y/1", long]
    assert [list(record.fields)[1:] for record in records] == [["jpg", "seg.png", "txt"], ["jpg", "json"], ["jpg"]]
    assert records[0].fields["txt"] == "é" and records[1].fields["json"] == {"a": [1]}
    assert [record.number for record in records] == [0, 1, 2]
    for record in records:
        for item in record.fields.values():
            if isinstance(item, EmbeddedBytes):
                assert read_blob(Blob(**{**item.blob, "container": Path(item.blob["container"])})) == item.data


def test_names_are_only_names(tmp_path):
    path = write(tmp_path / "a.tar", {"../../evil.jpg": b"x", "../../evil.txt": b"words", "/abs/1.jpg": b"y"})
    before = sorted(tmp_path.parent.rglob("*"))
    assert [record.fields["__key__"] for record in read(path)] == ["../../evil", "/abs/1"]
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_spoil_their_key_alone(tmp_path, kind):
    path = write(
        tmp_path / "a.tar", {"1.jpg": b"x", "1.txt": b"a", "2.txt": b"b"}, link("2.jpg", kind), link("3.jpg", kind)
    )
    records = read(path)
    assert [isinstance(record, BadRecord) for record in records] == [False, True, True]
    assert "expected a regular file" in records[1].reason and records[1].where == f"{path}, key '2'"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"1.txt": b"\xff"}, "1.txt': 'utf-8' codec"),
        ({"1.json": b"{"}, "1.json': Expecting"),
        ({"1.json": b"[" * 100_000}, "1.json'"),
        ({"1.jpg": b"", "1.JPG": b""}, "two members named '1.JPG'"),
    ],
)
def test_bad_members_spoil_their_key_alone(tmp_path, members, reason):
    records = read(write(tmp_path / "a.tar", {"0.txt": b"a"} | members | {"2.txt": b"b"}))
    assert [isinstance(record, BadRecord) for record in records] == [False, True, False]
    assert reason in records[1].reason


def test_every_cut_is_noticed(tmp_path):
    members = {f"{n}.{suffix}": bytes([65 + n]) * 700 for n in range(3) for suffix in ("jpg", "txt")}
    path = write(tmp_path / "a.tar", members)
    whole = read(path)
    content = path.read_bytes()
    for length in range(100, 6 * 1536 - 1, 400):
        path.write_bytes(content[:length])
        *good, bad = read(path)
        assert isinstance(bad, BadRecord), length
        good = [record.fields for record in good if not isinstance(record, BadRecord)]
        assert good == [record.fields for record in whole[: len(good)]]


def test_a_damaged_header_and_a_second_tar_are_noticed(tmp_path):
    path = write(tmp_path / "a.tar", {"1.txt": b"a", "2.txt": b"b", "3.txt": b"c"})
    content = path.read_bytes()
    path.write_bytes(content + content)
    assert "put together" in read(path)[-1].reason
    path.write_bytes(content[:2048] + b"\xff" * 512 + content[2560:])
    records = read(path)
    # The key before the damage may lack members.
    assert records[0].fields["txt"] == "a" and "a damaged header at byte 2048" in records[1].reason
    assert len(records) == 2 and records[1].where == f"{path}, key '2'"
