"""JSON arrays, JSON Lines and objects that hold a list, record by record."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mllm.data.importers.base import BadRecord, Record
from mllm.data.reading.json_text import (
    HALF_PAIR,
    MAX_RECORD_LENGTH,
    TOO_DEEP,
    BrokenValue,
    JsonText,
    has_half_pair,
    is_unicode,
)

LIST_KEYS = ("data", "annotations", "records", "rows", "samples", "examples")
"""Where an object keeps its list of records, such as WavCaps under `data`."""

LINE_SUFFIXES = (".jsonl", ".ndjson")
CHUNK_BYTES = 1 << 20
HEAD_BYTES = 1 << 16

_BOM = b"\xef\xbb\xbf"
_first_key = re.compile(r'\{\s*("(?:[^"\\]|\\.)*")\s*:').match


def read_json(path: Path, *, number: int = 0, chunk: int = CHUNK_BYTES) -> Iterator[Record | BadRecord]:
    """Read the records of an array, of JSON Lines, or of an object with a list under one of `LIST_KEYS`.

    Which of them it is shows in the bytes; the suffix decides only for what could be both. An object without such a
    list is one record. Invalid UTF-8 spoils its own record alone, and so does bad JSON in a line. Behind bad JSON in
    an array reading goes on where a record begins with the same key as this one; what lies between is one
    `BadRecord`.

    Args:
        path: The file.
        number: Number of the first record.
        chunk: How many bytes are read at a time.
    """
    with path.open("rb") as file:
        start, head = _skip_blanks(file)
        file.seek(start)
        if not head:
            yield BadRecord(str(path), "the file is empty", number)
        elif path.suffix.lower() in LINE_SUFFIXES and (head[:1] != b"[" or _first_line_is_whole(head)):
            yield from _read_lines(path, file, number)
        elif head[:1] == b"[":
            yield from _read_array(path, JsonText(file, chunk=chunk), number)
        elif head[:1] == b"{":
            yield from _read_object(path, file, start, number, chunk)
        else:
            reason = f"begins with {head[:24]!r}; expected a JSON array, or one JSON object a line"
            yield BadRecord(f"{path}, byte {start}", reason, number)


def _skip_blanks(file: BinaryIO) -> tuple[int, bytes]:
    """Where the content of a file begins, and its first bytes."""
    head = file.read(HEAD_BYTES).removeprefix(_BOM)
    while head and not head.lstrip():
        head = file.read(HEAD_BYTES)
    head = head.lstrip()
    return file.tell() - len(head), head


def _first_line_is_whole(head: bytes) -> bool:
    line, newline, _ = head.partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(newline)


# --- JSON Lines


def _read_lines(path: Path, file: BinaryIO, number: int) -> Iterator[Record | BadRecord]:
    file.seek(0)
    offset, count = 0, 0
    while line := file.readline(MAX_RECORD_LENGTH):
        start, offset, count = offset, offset + len(line), count + 1
        where = f"{path}, line {count}"
        if len(line) == MAX_RECORD_LENGTH and not line.endswith(b"\n"):
            offset += _skip_line(file)
            yield BadRecord(where, f"the line is longer than {MAX_RECORD_LENGTH:,} bytes", number)
        elif content := (line.removeprefix(_BOM) if count == 1 else line).strip():
            yield _line_record(content, where, start + line.index(content), number)
        else:
            continue
        number += 1


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of the line; how many bytes that was."""
    length = 0
    while rest := file.readline(CHUNK_BYTES):
        length += len(rest)
        if rest.endswith(b"\n"):
            break
    return length


def _line_record(line: bytes, where: str, start: int, number: int) -> Record | BadRecord:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(f"{where}, byte {start + error.start}", "bytes that are no UTF-8", number)
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        byte = start + len(text[: error.pos].encode("utf-8"))
        return BadRecord(f"{where}, byte {byte}", f"bad JSON: {error.msg}", number)
    except ValueError as error:  # an integer of thousands of digits
        return BadRecord(where, f"bad JSON: {error}", number)
    except RecursionError:
        return BadRecord(where, TOO_DEEP, number)
    if has_half_pair(text, fields, start=0, end=len(text)):
        return BadRecord(where, HALF_PAIR, number)
    return Record(fields, where, number)


# --- arrays


def _read_array(
    path: Path, text: JsonText, number: int, *, is_whole_file: bool = True
) -> Iterator[Record | BadRecord]:
    """Read the records of an array, whose `[` is the next letter."""
    first, key = number, ""

    def bad(byte: int, reason: str) -> BadRecord:
        return BadRecord(f"{path}, record {number - first + 1}, byte {byte}", reason, number)

    text.expect("[")
    is_open = True
    while is_open:
        mark = text.peek()
        if mark == "]":  # of an empty array, or behind a comma too many
            text.position += 1
            break
        try:
            if not mark:
                raise text.broken(text.position, "the file ends before the array does: is it complete?")
            value = text.value()
            key = key or _key_at(text, text.start)
            problem = text.problem(value)
            yield bad(*problem) if problem else Record(value, f"{path}, record {number - first + 1}", number)
            number += 1
            is_open = text.expect(",]") == ","
        except BrokenValue as error:
            yield bad(error.byte, error.reason)
            number += 1
            if not _find_next(text, key or _key_at(text, text.position)):
                return
    if is_whole_file and text.peek():
        found = text.text[text.position : text.position + 24]
        yield bad(text.byte(text.position), f"{found!r} behind the end of the array")


def _key_at(text: JsonText, position: int) -> str:
    """The first key of the object at a position of the window, as it is written; "" if none is there."""
    found = _first_key(text.text, position)
    return found[1] if found else ""


def _find_next(text: JsonText, key: str) -> bool:
    """Go to the next record that begins with this key, behind where bad JSON was noticed; False if there is none."""
    text.position = text.noticed
    pattern = re.compile(r",\s*(?=\{\s*" + re.escape(key) + r"\s*:)")
    return bool(key) and text.find(pattern, longest=len(key) + 256)


# --- objects


def _read_object(path: Path, file: BinaryIO, start: int, number: int, chunk: int) -> Iterator[Record | BadRecord]:
    """Read what begins with `{`: an object that holds the records, one record, or JSON Lines under another name."""
    text = JsonText(file, chunk=chunk)
    try:
        fields = _members(text)
    except BrokenValue as error:
        if _second_line_begins_object(file, start):
            yield from _read_lines(path, file, number)
        else:
            yield BadRecord(f"{path}, byte {error.byte}", error.reason, number)
        return
    if fields is None:
        yield from _read_array(path, text, number, is_whole_file=False)
    elif text.peek():
        yield from _read_lines(path, file, number)
    elif not is_unicode(fields):
        yield BadRecord(str(path), f"bytes that are no UTF-8, or {HALF_PAIR}", number)
    else:
        yield Record(fields, f"{path}, record 1", number)


def _members(text: JsonText) -> dict[str, Any] | None:
    """The members of an object, or None where the list of records begins."""
    fields: dict[str, Any] = {}
    text.expect("{")
    mark = "}" if text.peek() == "}" else ","
    while mark == ",":
        text.peek()
        key = text.value()
        text.expect(":")
        if text.peek() == "[" and key in LIST_KEYS:
            return None
        fields[key] = text.value()
        mark = text.expect(",}")
    return fields


def _second_line_begins_object(file: BinaryIO, start: int) -> bool:
    file.seek(start)
    _skip_line(file)
    return file.readline(HEAD_BYTES).lstrip()[:1] == b"{"
