"""MMPR and InternVL's MPO: JSONL with image, question, chosen and rejected; also for several images, videos and text.

Read as InternVL's own loader reads it: `<image>` in the question is a placeholder, and a question that has none gets
its only image in front. Assumed where neither loader nor documentation says: `clip` of a video is [start, end] in
seconds.
"""

from collections.abc import Iterator
from typing import Any

from mllm.data.importers.base import Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import has_keys, media_in_place, media_items, pair_row, rest_of, text_of
from mllm.data.sources import Source

USED = ("id", "image", "video", "clip", "question", "chosen", "rejected")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record is a question with two texts as answers; with `origin_dataset` it would be RLAIF-V's form."""
    return (
        has_keys(fields, "question", "chosen", "rejected")
        and isinstance(fields["question"], str)
        and "origin_dataset" not in fields
    )


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    fields = record.fields
    media = media_items(fields.get("image")) or _videos(fields)
    question = media_in_place(text_of(fields, "question"), media, first_if_unnamed=len(media) == 1)
    yield pair_row(
        record,
        messages=[{"role": "user", "content": question}],
        media=media,
        chosen=text_of(fields, "chosen"),
        rejected=text_of(fields, "rejected"),
        meta=rest_of(fields, USED),
    )


def _videos(fields: Fields) -> list[Fields]:
    videos, clip = media_items(fields.get("video"), "video"), fields.get("clip")
    if clip is None:
        return videos
    if len(videos) != 1 or not isinstance(clip, list | tuple) or len(clip) != 2:
        raise ImportProblem(f"clip = {clip!r:.60} for {len(videos)} videos; expected [start, end] of one video")
    return [{**videos[0], "start": clip[0], "end": clip[1]}]


IMPORTER = Importer(
    name="mpo",
    about="MMPR, InternVL MPO: JSONL with image (a path, a list or none), question, chosen, rejected",
    matches=matches,
    convert=convert,
)
