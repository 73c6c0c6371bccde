"""AudioCaps: CSV of audiocap_id, youtube_id, start_time, caption. The audio is not distributed with it.

Downloads name their files in many ways: `file` is the pattern. They are clips of 10 seconds; with `whole_files` they
are whole soundtracks, and the clip is cut out of them.
"""

from collections.abc import Iterator
from typing import Any

from mllm.data.importers.base import Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import has_keys
from mllm.data.importers.questions import DESCRIBE_SOUND, caption_of, file_name, option, question_row, seconds_of
from mllm.data.sources import Source

CLIP_SECONDS = 10.0
OPTIONS = {"file": "{youtube_id}.wav", "question": DESCRIBE_SOUND, "whole_files": False}


def matches(fields: Any, source: Source) -> bool:
    """Whether a record has the four columns."""
    return has_keys(fields, "audiocap_id", "youtube_id", "start_time", "caption")


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    fields = record.fields
    media: Fields = {"kind": "audio", "path": file_name(option(source, OPTIONS, "file"), fields)}
    if option(source, OPTIONS, "whole_files"):
        start = seconds_of(fields, "start_time")
        if start is None:
            raise ImportProblem("no start_time; expected seconds, for `whole_files` is set")
        media |= {"start": start, "end": start + CLIP_SECONDS}
    yield question_row(
        str(fields["audiocap_id"]),
        media,
        option(source, OPTIONS, "question"),
        caption_of(fields),
        meta={key: fields[key] for key in ("youtube_id", "start_time")},
    )


IMPORTER = Importer(
    name="audiocaps",
    about="AudioCaps: CSV of captions; `file` is the pattern of the clips' names",
    matches=matches,
    convert=convert,
    options=OPTIONS,
)
