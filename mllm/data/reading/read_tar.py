"""WebDataset tars as records: members grouped by key, nothing extracted."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.importers.base import BadRecord, EmbeddedBytes, Record
from mllm.data.importers.webdataset import KEY

TEXT_SUFFIXES = ("txt", "text", "caption", "cls", "id", "key", "url")
MAX_MEMBER_BYTES = 1 << 30
BLOCK = 512
MAX_PADDING = 1 << 16


def read_tar(path: Path, *, number: int = 0) -> Iterator[Record | BadRecord]:
    """Read an uncompressed tar, whose members of one key stand together.

    The key is a member's name up to the first dot of its last part, and the suffix what follows: of `a/1.seg.png` they
    are `a/1` and `seg.png`. A record holds `__key__` and its members by suffix: text as a string, JSON decoded, all
    else as `EmbeddedBytes` with its byte range. A name is only a name: nothing is written, wherever it may point. A
    link, a device or a member that cannot be read spoils the records of its key.

    Args:
        path: The file.
        number: Number of the first record.
    """
    group = _Group(path, "")
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # or it remembers them all
                if member.isdir():
                    continue
                key, suffix = _split_name(member.name)
                if key != group.key:
                    if group.fields:
                        yield group.record(number)
                        number += 1
                    group = _Group(path, key)
                group.add(tar, member, suffix, size)
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        end = size
        group.break_off(f"a damaged or cut tar: {error}")
    with path.open("rb") as file:
        file.seek(end)
        rest = file.read(MAX_PADDING)
    if rest[:BLOCK].strip(b"\0"):  # a header, damaged or cut: `tarfile` takes it for the end
        group.break_off(
            f"a damaged header at byte {end}; it and what is behind it, {size - end:,} bytes, are not read"
        )
    if group.fields:
        yield group.record(number)
        number += 1
    if not rest[:BLOCK].strip(b"\0") and rest.strip(b"\0"):
        reason = "more data behind the end of the tar; were several put together? They are not read"
        yield BadRecord(f"{path}, byte {end}", reason, number)


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower()


class _Group:
    """The members of one key."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.fields: dict[str, Any] = {}
        self.problem = ""

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, size: int) -> None:
        """Take a member up, or note what is wrong with it."""
        self.fields.setdefault(KEY, self.key)
        self.problem = self.problem or self._problem_of(member, suffix, size)
        if self.problem:
            return
        file = tar.extractfile(member)
        data = file.read() if file else b""
        if suffix in TEXT_SUFFIXES or suffix.rpartition(".")[2] == "json":
            try:
                text = data.decode("utf-8")
                self.fields[suffix] = text if suffix in TEXT_SUFFIXES else json.loads(text)
            except (ValueError, RecursionError) as error:
                self.problem = f"{member.name!r}: {error}"
        else:
            blob = {"container": str(self.path), "offset": member.offset_data, "length": member.size}
            self.fields[suffix] = EmbeddedBytes(data, blob, member.name)

    def break_off(self, problem: str) -> None:
        """Note why nothing can be read from here on; members of this key may be missing."""
        self.fields.setdefault(KEY, self.key)
        self.problem = problem

    def _problem_of(self, member: tarfile.TarInfo, suffix: str, size: int) -> str:
        if not member.isreg() or member.issparse():
            kind = "link" if member.issym() or member.islnk() else "device, a pipe or a sparse file"
            return f"{member.name!r} is a {kind}; expected a regular file"
        if suffix in self.fields:
            return f"two members named {member.name!r}"
        if member.size > MAX_MEMBER_BYTES:
            return f"{member.name!r} has {member.size:,} bytes; expected at most {MAX_MEMBER_BYTES:,}"
        if member.offset_data + member.size > size:
            return f"{member.name!r} goes on behind the end of the file: is the tar complete?"
        return ""

    def record(self, number: int) -> Record | BadRecord:
        """All that has been added."""
        where = f"{self.path}, key {self.key!r}" if self.key else str(self.path)
        return BadRecord(where, self.problem, number) if self.problem else Record(self.fields, where, number)
