"""What the preference importers share: media cells, questions that show media, and the row of a pair."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mllm.data.importers.base import Drop, EmbeddedBytes, Fields, ImportProblem, Record
from mllm.data.importers.placeholders import STRINGS, fill, holds_string

SAME_ANSWERS = "both answers are the same"
LEFT_OUT = "left_out"
"""Key of `meta`, on the first row of a record: how many parts of the record made no row, by reason."""


def media_items(value: Any, kind: str = "image") -> list[Fields]:
    """The media items in a cell: a path, bytes, a struct of both, a list of these, or nothing (None, "", [])."""
    if value is None or value == "":
        return []
    if isinstance(value, list | tuple):
        return [_media_item(item, kind) for item in value]
    return [_media_item(value, kind)]


def media_first(text: str, media: Sequence[Fields]) -> list[Fields]:
    """Content of a question whose media stand in front of its words; strings such as `<image>` in them are text."""
    return [{"type": item["kind"]} for item in media] + ([{"type": "text", "text": text}] if text else [])


def media_in_place(text: str, media: Sequence[Fields], *, first_if_unnamed: bool = False) -> list[Fields]:
    """Content of a question in which strings such as `<image>` say where the media stand; see `placeholders.fill`.

    Args:
        text: The question.
        media: What its strings stand for, in order.
        first_if_unnamed: Whether media come first where the text holds no such string, instead of being an error.

    Raises:
        ImportProblem: There are more or fewer strings than media.
    """
    by_kind = {kind: [item for item in media if item["kind"] == kind] for kind in STRINGS}
    if first_if_unnamed and not holds_string(text, by_kind):
        return media_first(text, media)
    (content,), _ = fill([text], by_kind)
    return media_first(content, ()) if isinstance(content, str) else content


def text_of(fields: Mapping[str, Any], key: str) -> str:
    """A text that has words in it.

    Raises:
        ImportProblem: The key is missing or holds something else.
    """
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ImportProblem(f"{key} = {value!r:.60}; expected a text with words in it")
    return value


def prompt_of(chosen: Any, rejected: Any) -> tuple[list[Any], str, str]:
    """The prompt that both sides repeat, and the two answers, where each side is a whole list of messages.

    Raises:
        ImportProblem: The prompts differ, or a side does not end with the assistant's text.
    """
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not is_messages(side):
            raise ImportProblem(f"{name} = {side!r:.60}; expected a list of messages with `role` and `content`")
    if list(chosen[:-1]) != list(rejected[:-1]):
        raise ImportProblem("chosen and rejected answer different prompts; expected the same messages before the last")
    return list(chosen[:-1]), answer_of(chosen, "chosen"), answer_of(rejected, "rejected")


def answer_of(side: Sequence[Any], name: str) -> str:
    """The text of a side's last message, which must be the assistant's.

    Raises:
        ImportProblem: It is somebody else's, holds media, or holds no words.
    """
    last = side[-1]
    if last["role"] != "assistant":
        raise ImportProblem(f"{name} ends with a message of the {last['role']}; expected the assistant's")
    content = last["content"]
    if isinstance(content, list | tuple):
        kinds = [part.get("type") for part in content]
        if any(kind != "text" for kind in kinds):
            raise ImportProblem(f"{name} holds content of types {_some(kinds)}; expected text alone")
        content = "".join(part.get("text") or "" for part in content)
    return text_of({name: content}, name)


def is_messages(value: Any) -> bool:
    """Whether this is a list of at least one message with `role` and `content`."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def has_keys(fields: Any, *keys: str) -> bool:
    """Whether a record is an object that holds all of these keys."""
    return isinstance(fields, Mapping) and all(key in fields for key in keys)


def pair_row(
    record: Record,
    *,
    id_key: str = "id",
    messages: list[Fields],
    media: list[Fields],
    chosen: str,
    rejected: str,
    contrast: list[Fields] | None = None,
    meta: Fields | None = None,
) -> Fields:
    """The row of a pair.

    Raises:
        Drop: Both answers are the same words, and there is no contrast that could tell them apart.
        ImportProblem: The messages do not end with the user's.
    """
    if not messages or messages[-1]["role"] != "user":
        raise ImportProblem("no message of the user before the answers; expected the question they answer")
    if chosen == rejected and not contrast:
        raise Drop(SAME_ANSWERS)
    name = record.fields.get(id_key)
    row: Fields = {
        "id": f"{record.number:08d}" if name is None or name == "" else str(name),
        "messages": messages,
        "media": media,
        "chosen": {"content": chosen},
        "rejected": {"content": rejected},
    }
    if contrast:
        row["contrast"] = contrast
    if meta:
        row["meta"] = meta
    return row


def rest_of(fields: Mapping[str, Any], used: Sequence[str]) -> Fields:
    """What a record says beside the keys that are used: its `meta`."""
    plain = str | int | float | bool | list | dict
    return {key: value for key, value in fields.items() if key not in used and isinstance(value, plain)}


def _media_item(value: Any, kind: str) -> Fields:
    if isinstance(value, str) and value:
        return {"kind": kind, "path": value}
    if isinstance(value, bytes):
        return {"kind": kind, "bytes": EmbeddedBytes(value)}
    if isinstance(value, EmbeddedBytes):
        return {"kind": kind, "bytes": value}
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        if data is None and isinstance(path, str) and path:
            return {"kind": kind, "path": path}
        if isinstance(data, bytes):
            data = EmbeddedBytes(data)
        if isinstance(data, EmbeddedBytes):
            return {"kind": kind, "bytes": replace(data, name=data.name or path or "")}
    raise ImportProblem(f"{kind} = {value!r:.60}; expected a file name, bytes, or a struct of both")


def _some(values: Sequence[Any]) -> str:
    return "[" + ", ".join(map(str, values[:3])) + (", ...]" if len(values) > 3 else "]")
