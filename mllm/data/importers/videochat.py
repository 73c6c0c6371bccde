"""VideoChat, VideoChat2-IT and Video-LLaMA: a video or an image, and a list `QA` of questions and answers.

The instruction `i` is the system message, as in VideoChat2's code; where `QA` has several different ones, each later
one stands in front of its question. An empty question, as caption sets have it, shows the file alone. `start` and
`end` cut the video, in seconds. The order of `QA` is kept (VideoChat2 shuffles it).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm.data.importers.base import Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import media_items, rest_of, text_of
from mllm.data.importers.questions import row_id, seconds_of
from mllm.data.sources import Source

USED = ("id", "QA", "video", "image", "start", "end")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record has a list `QA`, and a video or an image."""
    return (
        isinstance(fields, Mapping)
        and isinstance(fields.get("QA"), list | tuple)
        and ("video" in fields or "image" in fields)
    )


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    fields = record.fields
    if not matches(fields, source) or not fields["QA"]:
        raise ImportProblem("no questions; expected a list `QA` with at least one, and `video` or `image`")
    media = media_items(fields.get("video"), "video") + media_items(fields.get("image"), "image")
    if not media:
        raise ImportProblem("neither `video` nor `image` names a file; expected one of them")
    cut = {key: value for key in ("start", "end") if (value := seconds_of(fields, key)) is not None}
    for item in media:
        if item["kind"] == "video":
            item.update(cut)
    row: Fields = {
        "id": row_id(record),
        "messages": _messages(fields["QA"], media),
        "media": media,
    }
    if meta := rest_of(fields, USED):
        row["meta"] = meta
    yield row


def _messages(pairs: Sequence[Any], media: list[Fields]) -> list[Fields]:
    for pair in pairs:
        if not isinstance(pair, Mapping):
            raise ImportProblem(f"QA holds {pair!r:.60}; expected objects with `q` and `a`")
    system = _optional(pairs[0], "i")
    messages: list[Fields] = [{"role": "system", "content": system}] if system else []
    for number, pair in enumerate(pairs):
        question, instruction = _optional(pair, "q"), _optional(pair, "i")
        if instruction and instruction != system:
            question = f"{instruction}\n{question}" if question else instruction
        if number == 0:
            words = [{"type": "text", "text": question}] if question else []
            content: Any = [{"type": item["kind"]} for item in media] + words
        elif question:
            content = question
        else:
            raise ImportProblem(f"question {number} of QA is empty; expected words in all but the first")
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": text_of(pair, "a")}]
    return messages


def _optional(pair: Mapping[str, Any], key: str) -> str:
    value = pair.get(key)
    if value is not None and not isinstance(value, str):
        raise ImportProblem(f"{key} = {value!r:.60}; expected a text")
    return value or ""


IMPORTER = Importer(
    name="videochat",
    about="VideoChat, VideoChat2-IT, Video-LLaMA: video or image, QA (i, q, a), start, end",
    matches=matches,
    convert=convert,
)
