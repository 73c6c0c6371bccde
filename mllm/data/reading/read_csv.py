"""Comma- and tab-separated files as records of strings."""

import csv
from collections.abc import Iterator
from pathlib import Path

from mllm.data.importers.base import BadRecord, Record

MAX_NAME = 100
MAX_CELL = 64 << 20


def read_csv(path: Path, *, number: int = 0) -> Iterator[Record | BadRecord]:
    """Read a file of columns; tabs separate where the suffix is `.tsv`.

    The first line names them. It does not if one of its cells is empty, longer than `MAX_NAME` letters or equal to
    another: then the records are lists of cells, the first line included (the TSV files of RLHF-V's code).

    Args:
        path: The file.
        number: Number of the first record.
    """
    csv.field_size_limit(MAX_CELL)  # of the module, and 131,072 by default: less than an image in base64
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        columns: list[str] = []
        has_names = False
        while True:
            where = f"{path}, line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield BadRecord(where, f"no line of cells: {error} (is a quote missing?)", number)
                number += 1
                continue
            if cells is None:
                break
            if not columns and cells:
                columns = cells
                has_names = len(set(cells)) == len(cells) and all(0 < len(cell) <= MAX_NAME for cell in cells)
                if has_names:
                    continue
            if cells:  # else it is a blank line
                yield _record(columns if has_names else None, len(columns), cells, where, number)
                number += 1
    if not columns:
        yield BadRecord(str(path), "the file is empty", number)


def _record(
    columns: list[str] | None, num_columns: int, cells: list[str], where: str, number: int
) -> Record | BadRecord:
    if len(cells) != num_columns:
        names = f": {', '.join(columns)[:200]}" if columns else ""
        return BadRecord(where, f"{len(cells)} cells; expected {num_columns}{names}", number)
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord(where, "bytes that are no UTF-8", number)
    return Record(dict(zip(columns, cells, strict=True)) if columns else cells, where, number)
