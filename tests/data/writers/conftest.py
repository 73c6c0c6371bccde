import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm.data.blobs import read_media_bytes
from mllm.data.importers import detect_format
from mllm.data.importers.base import BadRecord
from mllm.data.indexing.index_cache import media_root_of
from mllm.data.indexing.media_paths import MediaPaths
from mllm.data.indexing.row_parser import RowParser
from mllm.data.reading.read import read_records
from mllm.data.schema import Answer, MediaItem, PreferenceRow, Row
from mllm.data.sources import Source


@pytest.fixture
def images(tmp_path: Path) -> list[MediaItem]:
    """Four small PNG files."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    items = []
    for number in range(4):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8)).save(path)
        items.append(MediaItem("image", path, height=6, width=8))
    return items


@pytest.fixture
def read_rows(tmp_path: Path) -> Callable[..., list[Row]]:
    """The rows of a file, as the index reads them, but for the sizes of their media."""

    def run(path: Path, **options: Any) -> list[Row]:
        source = Source(**{"path": path} | options)
        records = list(read_records(source))
        assert not [record for record in records if isinstance(record, BadRecord)]
        importer = detect_format(records, source)
        parser = RowParser(MediaPaths(media_root_of(source), {}), tmp_path / "own_media.bin")
        return [parser.parse(fields, record).row for record in records for fields in importer.convert(record, source)]

    return run


@pytest.fixture
def normal() -> Callable[[Row], dict[str, Any]]:
    """What must survive any form that has words for a row: everything but its source, its `meta` and its place."""
    return _normal


def _normal(row: Row) -> dict[str, Any]:
    facts = {
        "id": row.id,
        "coordinates": row.coordinates,
        "messages": [
            {"role": message["role"], "content": _content(message["content"]), "loss": message.get("loss", True)}
            for message in row.messages
        ],
        "media": [_media(item) for item in row.media],
    }
    if isinstance(row, PreferenceRow):
        facts |= {side: _answer(getattr(row, side)) for side in ("chosen", "rejected")}
        facts["contrast"] = None if row.contrast is None else [_media(item) for item in row.contrast]
    return facts


def _content(content: str | list[dict[str, Any]]) -> list[str]:
    """Texts and kinds, neighbouring texts joined: a text alone is as good as a list of it."""
    parts: list[str] = []
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        text = item["text"] if item["type"] == "text" else None
        if text is None:
            parts.append("kind:" + item["type"])
        elif parts and parts[-1].startswith("text:"):
            parts[-1] += text
        elif text:
            parts.append("text:" + text)
    return parts


def _answer(answer: Answer) -> tuple[Any, Any]:
    return _content(answer.content), None if answer.media is None else [_media(item) for item in answer.media]


def _media(item: MediaItem) -> tuple[Any, ...]:
    data = read_media_bytes(item)
    if isinstance(data, Path):
        data = data.read_bytes() if data.is_file() else str(data).encode()
    return item.kind, hashlib.sha256(data).hexdigest(), item.start, item.end


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """A row of a question, an answer and media; a preference with `chosen`."""

    def run(question: Any = "What?", answer: Any = "A cat.", media: Any = (), **changes: Any) -> Row:
        messages = [{"role": "user", "content": question}]
        if "chosen" not in changes:
            messages.append({"role": "assistant", "content": answer})
        fields = {"id": "r", "source": "s", "messages": messages, "media": tuple(media), "where": "here"} | changes
        return PreferenceRow(**fields) if "chosen" in changes else Row(**fields)

    return run
