"""The records of a source, streamed: whatever the file, in whatever number of files."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mllm.data.importers.base import BadRecord, Record
from mllm.data.reading.read_csv import read_csv
from mllm.data.reading.read_json import read_json
from mllm.data.reading.read_tables import read_arrow, read_parquet
from mllm.data.reading.read_tar import read_tar
from mllm.data.reading.source_files import source_files
from mllm.data.sources import Source

Reader = Callable[..., Iterator[Record | BadRecord]]

# Beginnings of files that hold no records as they are, and what to say of them.
_UNREADABLE = {
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"PK\x03\x04": "a zip file: unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstandard file: unpack it first",
    b"\xfd7zXZ": "an xz file: unpack it first",
    b"BZh": "a bzip2 file: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file it stands for (git lfs pull)",
    b"\xff\xfe": "UTF-16: convert it to UTF-8",
    b"\xfe\xff": "UTF-16: convert it to UTF-8",
}


def read_records(source: Source) -> Iterator[Record | BadRecord]:
    """Read the records of all files of a source, in order, in bounded memory.

    Records are numbered through, `BadRecord`s included. A file's kind is told from its first bytes; the suffix decides
    where they leave it open.

    Raises:
        OptionError: There are no such files.
    """
    number = 0
    for path in source_files(source):
        for record in read_file(path, number=number):
            yield record
            number = record.number + 1


def read_file(path: Path, *, number: int = 0) -> Iterator[Record | BadRecord]:
    """Read the records of one file; `number` is that of the first."""
    last = number - 1
    try:
        with path.open("rb") as file:
            head = file.read(512)
        for beginning, reason in _UNREADABLE.items():
            if head.startswith(beginning) and not _is_arrow(head):
                yield BadRecord(str(path), reason, number)
                return
        if not head:
            yield BadRecord(str(path), "the file is empty", number)
            return
        for record in _reader(path, head)(path, number=number):
            last = record.number
            yield record
    except OSError as error:
        yield BadRecord(str(path), f"cannot be read: {error.strerror or error}", last + 1)


def _reader(path: Path, head: bytes) -> Reader:
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return read_parquet
    if _is_arrow(head) or suffix == ".arrow":
        return read_arrow
    if head[257:262] == b"ustar" or suffix == ".tar":
        return read_tar
    return read_csv if suffix in (".csv", ".tsv") else read_json


def _is_arrow(head: bytes) -> bool:
    return head.startswith((b"ARROW1", b"\xff\xff\xff\xff"))
