"""ms-swift's standard form: JSONL with `messages` of strings, and lists of images, videos and audios beside them.

`<image>`, `<video>`, `<audio>` in any message stand for the media, one string for each; `<ref-object>` and `<bbox>`
for what `objects` lists. A box becomes text, `[left, top, right, bottom]`, and the row says in which coordinates.

A pair ends with the better answer and has `rejected_response` (the worse one), `rejected_images` (what the worse
side is read under; alone: the same answer under other images), or `rejected_messages` (the whole other side). Records
with tools or a `label` are left out and counted; keys that are not of the form go to `meta`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm.data.importers.base import Drop, Fields, Importer, ImportProblem, Record
from mllm.data.importers.placeholders import STRINGS, Content, fill
from mllm.data.importers.preferences import is_messages, media_items, rest_of
from mllm.data.importers.questions import row_id
from mllm.data.sources import Source

MEDIA = {"image": "images", "video": "videos", "audio": "audios"}
BOX_TYPES = {"real": "pixel", "norm1": "unit"}
"""`objects.bbox_type` and what rows call it."""

REJECTED = ("rejected_response", "rejected_messages", *(f"rejected_{name}" for name in MEDIA.values()))
USED = ("id", "messages", "objects", *MEDIA.values(), *REJECTED)
TOOL_ROLES = ("tool", "tool_call", "tool_response")

_OBJECTS = re.compile("<ref-object>|<bbox>")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record has string messages, and media strings with their lists, or a key that only ms-swift has."""
    if not isinstance(fields, Mapping) or not is_messages(fields.get("messages")):
        return False
    texts = [message["content"] for message in fields["messages"] if isinstance(message["content"], str)]
    if len(texts) != len(fields["messages"]):
        return False
    if any(fields.get(key) for key in ("objects", *REJECTED)):
        return True
    if any("loss_scale" in message for message in fields["messages"]):
        return True
    return any(fields.get(name) and STRINGS[kind] in text for kind, name in MEDIA.items() for text in texts)


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    fields = record.fields
    if not isinstance(fields, Mapping) or not is_messages(fields.get("messages")):
        raise ImportProblem("no `messages`; expected a list of messages with `role` and `content`")
    if fields.get("tools"):
        raise Drop("uses tools")
    if fields.get("label") is not None:
        raise Drop("a label (KTO, classification), no answer to learn")
    row: Fields = {"id": row_id(record)}
    messages = [_message(message) for message in fields["messages"]]
    if coordinates := _write_objects(messages, fields.get("objects")):
        row["coordinates"] = coordinates
    media = {kind: media_items(fields.get(key), kind) for kind, key in MEDIA.items()}
    if any(fields.get(key) for key in REJECTED):
        row |= _pair(fields, messages, media)
    else:
        contents, items = fill([message["content"] for message in messages], media)
        row |= {"messages": _with_contents(messages, contents), "media": items}
    if meta := rest_of(fields, USED):
        row["meta"] = meta
    yield row


def _message(message: Mapping[str, Any]) -> Fields:
    role, content = message["role"], message["content"]
    if role in TOOL_ROLES:
        raise Drop("uses tools")
    if not isinstance(content, str):
        raise ImportProblem(f"content = {content!r:.60}; expected a string, as this form has it")
    made: Fields = {"role": role, "content": content}
    loss, scale = message.get("loss"), message.get("loss_scale")
    if role == "assistant" and (loss is not None or scale is not None):
        made["loss"] = bool(loss) if scale is None or loss is False else scale
    return made


def _pair(fields: Mapping[str, Any], messages: list[Fields], media: Mapping[str, list[Fields]]) -> Fields:
    if messages[-1]["role"] != "assistant":
        raise ImportProblem(f"messages end with the {messages[-1]['role']}; expected the better answer at the end")
    *prompt, last = messages
    answer = last["content"]
    contents, items = fill([message["content"] for message in prompt], media)
    other = {kind: media_items(fields.get(f"rejected_{key}"), kind) for kind, key in MEDIA.items()}
    if fields.get("rejected_messages"):
        rejected = _other_side(fields["rejected_messages"], contents, other)
    else:
        rejected = _rejected_response(fields.get("rejected_response"), answer)
    if fields.get("objects") and _OBJECTS.search(rejected):
        raise ImportProblem("<bbox> or <ref-object> in the worse answer; expected them in messages alone")
    rejected_side: Fields = {"content": rejected}
    side_media = _side_media(items, media, other)
    if side_media != items:
        rejected_side["media"] = side_media
    elif answer == rejected:
        raise Drop("both answers are the same, under the same media")
    return {
        "messages": _with_contents(prompt, contents),
        "media": items,
        "chosen": {"content": answer},
        "rejected": rejected_side,
    }


def _other_side(value: Any, contents: Sequence[Content], media: Mapping[str, list[Fields]]) -> str:
    """The last answer of `rejected_messages`, whose prompt must be that of `messages`."""
    if not is_messages(value):
        raise ImportProblem(f"rejected_messages = {value!r:.60}; expected a list of messages")
    *prompt, last = [_message(message) for message in value]
    if last["role"] != "assistant":
        raise ImportProblem(f"rejected_messages end with the {last['role']}; expected the assistant")
    if fill([message["content"] for message in prompt], media)[0] != list(contents):
        raise ImportProblem("messages and rejected_messages differ before the answer; expected one prompt")
    return last["content"]


def _rejected_response(value: Any, answer: str) -> str:
    if value is None:
        return answer
    if is_messages(value):
        if [message["role"] for message in value] != ["assistant"]:
            raise Drop("uses tools, or several turns, in rejected_response")
        value = value[0]["content"]
    if not isinstance(value, str):
        raise ImportProblem(f"rejected_response = {value!r:.60}; expected a text, or a list of messages")
    return value


def _side_media(
    items: list[Fields], own: Mapping[str, list[Fields]], other: Mapping[str, list[Fields]]
) -> list[Fields]:
    """The rejected side's media in the places of the row's own; a kind that it does not name stays as it is."""
    for kind, side in other.items():
        if side and len(side) != len(own[kind]):
            raise ImportProblem(
                f"{len(side)} rejected_{MEDIA[kind]} and {len(own[kind])} {MEDIA[kind]}; expected as many"
            )
    left = {kind: iter(other[kind] or own[kind]) for kind in MEDIA}
    return [next(left[item["kind"]]) for item in items]


def _with_contents(messages: Sequence[Fields], contents: Sequence[Content]) -> list[Fields]:
    return [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]


def _write_objects(messages: list[Fields], objects: Any) -> str:
    """Put what `objects` lists in the place of its strings; returns how the boxes are written, "" for no boxes."""
    if not objects:
        return ""
    refs, boxes = objects.get("ref") or [], objects.get("bbox") or []
    texts = [message["content"] for message in messages]
    found = [string for text in texts for string in _OBJECTS.findall(text)]
    if found.count("<ref-object>") != len(refs) or found.count("<bbox>") != len(boxes):
        raise ImportProblem(
            f"{found.count('<ref-object>')} <ref-object> and {found.count('<bbox>')} <bbox> in the texts, "
            f"{len(refs)} ref and {len(boxes)} bbox in objects; expected one for each"
        )
    box_type = objects.get("bbox_type") or "real"
    if box_type not in BOX_TYPES:
        raise ImportProblem(f"bbox_type = {box_type!r:.40}; expected one of {', '.join(BOX_TYPES)}")
    if box_type == "real":
        _check_images(texts, objects.get("image_id") or [0] * len(boxes))
    left = {"<ref-object>": iter(refs), "<bbox>": iter([box_text(box, box_type) for box in boxes])}
    for message in messages:
        message["content"] = _OBJECTS.sub(lambda match: str(next(left[match[0]])), message["content"])
    return BOX_TYPES[box_type] if boxes else ""


def box_text(box: Any, box_type: str) -> str:
    """A box as rows write it; shares always have a decimal point.

    Raises:
        ImportProblem: It has not four numbers.
    """
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(type(side) in (int, float) for side in box):
        raise ImportProblem(f"bbox = {box!r:.60}; expected four numbers (rows move boxes with the image, not points)")
    sides = [float(side) if box_type == "norm1" else side for side in box]
    return "[" + ", ".join(_number(side) for side in sides) + "]"


def _number(value: int | float) -> str:
    text = repr(value)
    return text if "e" not in text else f"{value:.6f}"


def _check_images(texts: Sequence[str], image_ids: Sequence[Any]) -> None:
    """A row's box belongs to the last image before it; a box of another image cannot be said."""
    seen, number = 0, 0
    for part in re.findall("<image>|<bbox>", "".join(texts)):
        if part == "<image>":
            seen += 1
            continue
        if number >= len(image_ids) or image_ids[number] != max(seen - 1, 0):
            raise ImportProblem(
                f"box {number} is of image {image_ids[number : number + 1]} and stands behind image "
                f"{max(seen - 1, 0)}; expected it behind its own"
            )
        number += 1


IMPORTER = Importer(
    name="ms_swift",
    about="ms-swift: JSONL with messages, images/videos/audios, objects, rejected_response",
    matches=matches,
    convert=convert,
)
