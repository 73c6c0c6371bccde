"""WavCaps: an object whose `data` lists sounds with a caption each (or caption_1, caption_2, ... for several).

The published lists name no file: the archives hold the sounds under their ids, as FLAC. Lists that were prepared for
training say so under `audio`. Lists of ids that must not be trained on (WavCaps' own blacklists, against leakage into
AudioCaps and Clotho) go into `exclude`: a JSON list of ids, or an object of such lists by source.
"""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mllm.data.importers.base import Drop, Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import has_keys, rest_of
from mllm.data.importers.questions import DESCRIBE_SOUND, caption_of, file_name, option, question_row, seconds_of
from mllm.data.sources import Source
from mllm.errors import OptionError

OPTIONS = {"file": "{id}.flac", "question": DESCRIBE_SOUND, "max_seconds": 0.0, "exclude": ""}
USED = ("id", "caption", "audio")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record is a captioned sound: an id, a duration and a caption, and no conversation."""
    return has_keys(fields, "id", "duration") and ("caption" in fields or "caption_1" in fields) and "QA" not in fields


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row per caption."""
    fields = record.fields
    if not matches(fields, source):
        raise ImportProblem("no id, duration and caption; expected a sound of WavCaps")
    name = str(fields["id"])
    if (exclude := option(source, OPTIONS, "exclude")) and name in _excluded(Path(exclude)):
        raise Drop("excluded")
    longest, duration = float(option(source, OPTIONS, "max_seconds")), seconds_of(fields, "duration")
    if longest and duration is not None and duration > longest:
        raise Drop(f"longer than {longest:g} seconds")
    path = fields.get("audio")
    if not isinstance(path, str) or not path:
        stem = name.removesuffix(".wav")  # ids of the AudioSet part are names of files that the archive holds as FLAC
        path = file_name(option(source, OPTIONS, "file"), {**fields, "id": stem})
    captions = ["caption"] if "caption" in fields else _numbered(fields)
    for number, key in enumerate(captions):
        yield question_row(
            name if len(captions) == 1 else f"{name}/{number}",
            {"kind": "audio", "path": path},
            option(source, OPTIONS, "question"),
            caption_of(fields, key),
            meta=rest_of(fields, (*USED, *captions)),
        )


def _numbered(fields: Mapping[str, Any]) -> list[str]:
    keys = [f"caption_{number}" for number in range(1, 100)]
    return [key for key in keys if fields.get(key)]


@lru_cache(maxsize=4)
def _excluded(path: Path) -> frozenset[str]:
    try:
        ids = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise OptionError(f"exclude: {path}: {error}", expected="a JSON list of ids", do="correct the path") from error
    lists = ids.values() if isinstance(ids, dict) else [ids]
    return frozenset(str(name) for part in lists for name in part)


IMPORTER = Importer(
    name="wavcaps",
    about="WavCaps: an object with a list `data` of captioned sounds",
    matches=matches,
    convert=convert,
    options=OPTIONS,
)
