import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mllm.data.importers import detect_format
from mllm.data.importers.base import BadRecord
from mllm.data.reading.read import read_records
from mllm.data.schema import Row, parse_row
from mllm.data.sources import Source


@pytest.fixture
def import_rows(tmp_path: Path) -> Callable[..., list[Row]]:
    """Rows of a file in its published form: written, read, recognised where no format is named, converted, checked.

    `published` is the file's text, or what its JSON holds; by its name a JSONL file has one element a line.
    """

    def run(published: Any, name: str = "data.json", **source: Any) -> list[Row]:
        path = tmp_path / name
        if isinstance(published, str):
            text = published
        elif path.suffix == ".jsonl":
            text = "".join(json.dumps(record) + "\n" for record in published)
        else:
            text = json.dumps(published)
        path.write_text(text, encoding="utf-8")
        described = Source(**{"path": path} | source)
        records = list(read_records(described))
        assert not [record for record in records if isinstance(record, BadRecord)]
        importer = detect_format(records, described)
        return [
            parse_row(fields, where=record.where, root=tmp_path)
            for record in records
            for fields in importer.convert(record, described)
        ]

    return run
