"""Pairs as rows on disk: what `data:` of a training run reads."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mllm.data.schema import MediaItem, parse_row
from mllm.data.writers.media_files import MediaFiles
from mllm.preference_data.answered import Answered
from mllm.preference_data.outcomes import Outcome

ROWS, MIXTURE, EMBEDDED = "rows.jsonl", "mixture.yaml", "embedded"
META = "re_align"
"""Key in a row's meta under which it says how it was made."""

Pair = tuple[Answered, MediaItem, Outcome]
"""A row taken apart, the image that was retrieved for it, and what became of it."""


def write_pairs(pairs: Iterable[Pair], images: Iterable[MediaItem], directory: Path, *, licence: str) -> None:
    """Write `rows.jsonl`, and a `mixture.yaml` that names it.

    Paths are written relative to the directory that all images have in common. Images that lie inside other files
    become files beside the rows.

    Args:
        pairs: What to write.
        images: All images that a pair may show.
        directory: Where to write.
        licence: Of the rows, as their source states it.
    """
    images = list(images)
    folders = {os.path.dirname(os.path.abspath(item.path)) for item in images if item.path is not None}
    common = Path(os.path.commonpath(folders)) if folders else directory
    has_embedded = any(item.path is None for item in images)
    root = directory if has_embedded else common
    files = MediaFiles(root, embedded=directory / EMBEDDED)
    with (directory / ROWS).open("w", encoding="utf-8") as file:
        for number, pair in enumerate(pairs, start=1):
            fields = _fields(pair, files)
            parse_row(fields, where=f"{ROWS}, line {number}", root=root)
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
    source: dict[str, Any] = {"path": ROWS, "format": "mllm", "name": META, "licence": licence}
    if not has_embedded:
        source["media_root"] = str(common)
    elif folders:
        source["remap"] = {str(common): str(common)}  # absolute paths under it may be read
    text = yaml.safe_dump({"sources": [source]}, sort_keys=False)
    (directory / MIXTURE).write_text(text, encoding="utf-8")


def _fields(pair: Pair, files: MediaFiles) -> dict[str, Any]:
    answered, retrieved, outcome = pair
    row, masked = answered.row, outcome.phrases
    made = {
        "masked": [answered.answer[phrase.start : phrase.end] for phrase in masked],
        "similarity": round(outcome.similarity, 6),
        "cosine": round(outcome.cosine, 6),
        "rank": len(outcome.tries),
    }
    fields = {
        "id": row.id,
        "source": row.source,
        "messages": answered.messages,
        "media": [_media(answered.image, files)],
        "chosen": {"content": answered.answer},
        "rejected": {"content": outcome.rejected},
        "contrast": [_media(retrieved, files)],
        "meta": row.meta | {META: made},
    }
    return fields | ({"coordinates": row.coordinates} if row.coordinates else {})


def _media(item: MediaItem, files: MediaFiles) -> dict[str, Any]:
    return {"kind": item.kind, "path": files.path(item), "height": item.height, "width": item.width}
