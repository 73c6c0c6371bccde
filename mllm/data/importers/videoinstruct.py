"""VideoInstruct-100K (Video-ChatGPT): `q`, `a` and `video_id`; the file is named after the video.

Some answers carry the tag `QA_GT_caption_based_noisy`, left there by the script that made them: it is removed.
"""

from collections.abc import Iterator
from typing import Any

from mllm.data.importers.base import Fields, Importer, Record
from mllm.data.importers.preferences import has_keys, rest_of, text_of
from mllm.data.importers.questions import file_name, option, question_row, row_id
from mllm.data.sources import Source

NOISE = "QA_GT_caption_based_noisy"
OPTIONS = {"file": "{video_id}.mp4"}
USED = ("id", "q", "a", "video_id")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record has a question, an answer and the id of a video."""
    return has_keys(fields, "q", "a", "video_id")


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    fields = record.fields
    media = {"kind": "video", "path": file_name(option(source, OPTIONS, "file"), fields)}
    question, answer = (_without_noise(text_of(fields, key), key) for key in ("q", "a"))
    yield question_row(
        row_id(record),
        media,
        question,
        answer,
        meta={"video_id": fields["video_id"], **rest_of(fields, USED)},
    )


def _without_noise(text: str, key: str) -> str:
    return text_of({key: text.replace(NOISE, "").strip()}, key) if NOISE in text else text


IMPORTER = Importer(
    name="videoinstruct",
    about="VideoInstruct-100K: q, a, video_id; `file` is the pattern of the videos' names",
    matches=matches,
    convert=convert,
    options=OPTIONS,
)
