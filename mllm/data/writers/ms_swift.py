"""ms-swift's JSONL: messages of strings, lists of media, `objects` for boxes, and the rejected side of a pair.

The worse side of a pair is written as `rejected_response`, and as `rejected_images` where its images are others; with
audio or video among the media as the whole `rejected_messages`. Contrast media become a record of their own, whose id
ends with "/contrast": the same answer under other images.

Boxes of the coordinates "pixel" and "unit" become `<bbox>` and `objects`, if their numbers read back with the same
digits; else they stay words and lose their meaning, which is counted. Lost, too: `source`, `meta`.

Not said: cuts of files, media in an answer of a preference, and `<image>`, `<video>`, `<audio>`, `<bbox>`,
`<ref-object>` as words.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mllm.data.importers.base import ImportProblem
from mllm.data.importers.ms_swift import BOX_TYPES, MEDIA, box_text
from mllm.data.importers.placeholders import STRINGS
from mllm.data.schema import MediaItem, PreferenceRow, Row
from mllm.data.writers.media_files import MediaFiles
from mllm.data.writers.outputs import write_json_lines
from mllm.data.writers.report import Report, Unsayable, say_all
from mllm.data.writers.strings import answer_text, note_lost, text_with_strings

LITERALS = (*STRINGS.values(), "<bbox>", "<ref-object>")
_BOX_TYPE_OF = {coordinates: box_type for box_type, coordinates in BOX_TYPES.items()}
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX_OR_IMAGE = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]|<image>")


def write_ms_swift(
    rows: Iterable[Row],
    out: Path,
    *,
    media_root: Path | None = None,
    embedded: Path | None = None,
    on_unsayable: str = "error",
) -> Report:
    """Write one JSONL file.

    Args:
        rows: To write.
        out: The file; it must not exist.
        media_root: What paths are relative to; the file's directory by default.
        embedded: Where embedded media become files; None to have no words for them.
        on_unsayable: "error", or "skip" to leave out and count what this form cannot say.

    Raises:
        OptionError: The file exists.
        RowError: A row cannot be said.
    """
    report, files = Report(), MediaFiles(media_root or out.parent, embedded=embedded)
    records = say_all(rows, lambda row: _say(row, report, files), report, on_unsayable=on_unsayable)
    write_json_lines(out, chain.from_iterable(records))
    report.files.append(out)
    return report


def _say(row: Row, report: Report, files: MediaFiles) -> list[dict[str, Any]]:
    messages = [_message(message) for message in row.messages]
    if isinstance(row, PreferenceRow):
        records = _pairs(row, messages, files)
        note_lost(row, report, keeps=("contrast media",))
        return records
    record: dict[str, Any] = {"id": row.id, "messages": messages, **_columns(row.media, files)}
    has_boxes = row.coordinates in _BOX_TYPE_OF and all(item.kind == "image" for item in row.media)
    objects = _take_boxes(messages, _BOX_TYPE_OF[row.coordinates]) if has_boxes else None
    if objects:
        record["objects"] = objects
    note_lost(row, report, keeps=("coordinates",) if objects else ())
    return [record]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message["role"], "content": text_with_strings(message["content"], LITERALS)}
    loss = message.get("loss")
    if loss is not None:
        said["loss" if isinstance(loss, bool) else "loss_scale"] = loss
    return said


def _pairs(row: PreferenceRow, prompt: list[dict[str, Any]], files: MediaFiles) -> list[dict[str, Any]]:
    """The record of a pair, and the one of its contrast."""
    answer, worse = answer_text(row.chosen, LITERALS), answer_text(row.rejected, LITERALS)
    media = row.media if row.chosen.media is None else row.chosen.media
    worse_media = row.media if row.rejected.media is None else row.rejected.media
    record = {
        "id": row.id,
        "messages": [*prompt, {"role": "assistant", "content": answer}],
        **_columns(media, files),
    }
    worse_columns = _columns(worse_media, files)
    pair = record | _rejected(record, prompt, answer, worse, worse_columns)
    if row.contrast is None:
        return [pair]
    contrast = _rejected(record, prompt, answer, answer, _columns(row.contrast, files))
    return [pair, record | {"id": f"{row.id}/contrast"} | contrast]


def _rejected(
    record: dict[str, Any], prompt: list[dict[str, Any]], answer: str, worse: str, columns: dict[str, list[str]]
) -> dict[str, Any]:
    has_own_media = any(record[name] != paths for name, paths in columns.items())
    if has_own_media and set(columns) != {"images"}:
        messages = [*prompt, {"role": "assistant", "content": worse}]
        return {"rejected_messages": messages, **{f"rejected_{name}": paths for name, paths in columns.items()}}
    if worse == answer and not has_own_media:
        raise Unsayable("two sides that are the same")
    said: dict[str, Any] = {} if worse == answer else {"rejected_response": worse}
    return said | {"rejected_images": columns["images"]} if has_own_media else said


def _columns(media: Sequence[MediaItem], files: MediaFiles) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {}
    for item in media:
        columns.setdefault(MEDIA[item.kind], []).append(files.path(item))
    return columns


def _take_boxes(messages: list[dict[str, Any]], box_type: str) -> dict[str, Any] | None:
    """Replace the boxes in the messages by `<bbox>` and return `objects`; None, and no change, where that fails."""
    boxes: list[list[int | float]] = []
    image_ids: list[int] = []
    num_images = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal num_images
        if match[0] == "<image>":
            num_images += 1
            return match[0]
        box = [float(side) if "." in side else int(side) for side in match.groups()]
        if _written(box, box_type) != match[0]:
            raise _OtherNumbersError
        boxes.append(box)
        image_ids.append(max(num_images - 1, 0))
        return "<bbox>"

    try:
        texts = [_BOX_OR_IMAGE.sub(replace, message["content"]) for message in messages]
    except _OtherNumbersError:
        return None
    if not boxes:
        return None
    for message, text in zip(messages, texts, strict=True):
        message["content"] = text
    return {"ref": [], "bbox": boxes, "bbox_type": box_type, "image_id": image_ids}


class _OtherNumbersError(Exception):
    """A box that would be read back with other digits."""


def _written(box: list[int | float], box_type: str) -> str:
    try:
        return box_text(box, box_type)
    except ImportProblem:
        return ""
