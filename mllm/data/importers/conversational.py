"""Hugging Face's conversational form: `messages`, or `prompt` and `completion`, with `images` beside them.

A content is a text, or a list of parts `{"type": "text", "text": ...}` and `{"type": "image"}`. A part without a file
of its own (`image`, `url`, `path`) takes the next of the column of its kind, or the one that its `index` names. Where
no part is a medium, all media go before the first text of the user, as in TRL. Strings such as `<image>` are text.

Of `prompt` and `completion`, the completion alone is learned.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm.data.importers.base import Fields, Importer, ImportProblem, Record
from mllm.data.importers.messages import (
    MEDIA,
    ROLES,
    conversation_row,
    has_media_columns,
    media_columns,
    parts_of,
)
from mllm.data.importers.placeholders import STRINGS
from mllm.data.importers.preferences import has_keys, is_messages, media_first, media_items
from mllm.data.schema import MEDIA_KINDS
from mllm.data.sources import Source

USED = ("messages", "prompt", "completion", *MEDIA)
ELSEWHERE = (
    *("chosen", "rejected", "rejected_response", "rejected_images", "rejected_messages", "objects"),
    *("contrast", "completions", "conversations"),
)
"""Keys of other forms that have `messages` or `prompt`."""


def matches(fields: Any, source: Source) -> bool:
    """Whether there are messages in which no string stands for a medium, and no key or part is of another form."""
    if not isinstance(fields, Mapping) or any(fields.get(key) for key in ELSEWHERE) or "media" in fields:
        return False
    if "messages" not in fields:
        return all(isinstance(fields.get(key), str | list) for key in ("prompt", "completion"))
    if not is_messages(fields["messages"]):
        return False
    kinds = set()
    for message in fields["messages"]:
        content = message["content"]
        if "loss_scale" in message:  # ms-swift's
            return False
        if isinstance(content, str):
            if has_media_columns(fields) and any(string in content for string in STRINGS.values()):
                return False
        elif isinstance(content, list) and all(has_keys(part, "type") for part in content):
            kinds |= {part["type"] for part in content}
        else:
            return False
    return kinds <= {"text", *MEDIA_KINDS}


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    fields = record.fields
    if has_keys(fields, "messages"):
        messages = message_list(fields["messages"], "messages")
    elif has_keys(fields, "prompt", "completion"):
        prompt = message_list(fields["prompt"], "prompt", role="user")
        messages = [
            {**message, "loss": False} if message.get("role") == "assistant" else message for message in prompt
        ] + message_list(fields["completion"], "completion", role="assistant")
    else:
        raise ImportProblem("neither `messages` nor `prompt` and `completion`")
    yield conversation(record, fields, messages=messages, media=media_columns(fields))


def conversation(
    record: Record, fields: Mapping[str, Any], *, messages: Sequence[Any], media: Mapping[str, list[Fields]]
) -> Fields:
    """The row of messages in this form.

    Args:
        record: Where it comes from.
        fields: What else is known.
        messages: As published.
        media: By kind, of the columns.

    Raises:
        ImportProblem: A message is malformed, or there are more or fewer parts than media.
    """
    binder = _Binder(media)
    contents = [binder.content(message.get("content")) for message in messages]
    if not binder.bound:
        _put_first(messages, contents, media)
        items = [item for kind in MEDIA_KINDS for item in media.get(kind, ())]
    else:
        binder.check_all_used()
        items = binder.bound
    rows = [_message(message, content) for message, content in zip(messages, contents, strict=True)]
    return conversation_row(record, fields, messages=rows, media=items, used=USED)


def message_list(value: Any, name: str, *, role: str = "") -> list[Any]:
    """The messages in a column; a text is one of this role, if there is one.

    Raises:
        ImportProblem: The column of this name holds something else.
    """
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not is_messages(value):
        raise ImportProblem(f"{name} = {value!r:.60}; expected messages with `role` and `content`")
    return list(value)


def _message(message: Mapping[str, Any], content: str | list[Fields]) -> Fields:
    role = message.get("role")
    if role not in ROLES or message.get("tool_calls"):
        raise ImportProblem(f"a message of role {role!r:.40}; expected {', '.join(ROLES)}, without tool calls")
    made: Fields = {"role": ROLES[role], "content": content}
    if message.get("loss") is not None:
        made["loss"] = message["loss"]
    return made


class _Binder:
    """Gives parts their media, in order of appearance."""

    def __init__(self, media: Mapping[str, list[Fields]]):
        self.media = media
        self.bound: list[Fields] = []
        self._used: dict[str, set[int]] = {kind: set() for kind in MEDIA_KINDS}
        self._next = dict.fromkeys(MEDIA_KINDS, 0)

    def content(self, content: Any) -> str | list[Fields]:
        """A content as rows have it."""
        if isinstance(content, str):
            return content
        if not isinstance(content, list | tuple):
            raise ImportProblem(f"content = {content!r:.60}; expected a text, or a list of parts")
        items: list[Fields] = []
        for part in parts_of(content):
            kind = part["type"]
            if kind in MEDIA_KINDS:
                self.bound.append(self._medium(kind, part))
                items.append({"type": kind})
            elif kind == "text" and isinstance(part.get("text"), str):
                items.append({"type": "text", "text": part["text"]})
            else:
                raise ImportProblem(f"a part {part!r:.60}; expected type text, {', '.join(MEDIA_KINDS)}")
        return items

    def check_all_used(self) -> None:
        """Raise an `ImportProblem` if a medium stands nowhere."""
        for kind, items in self.media.items():
            if len(self._used[kind]) < len(items):
                raise ImportProblem(
                    f"{len(items)} {kind}s and parts for {len(self._used[kind])} of them; expected one for each"
                )

    def _medium(self, kind: str, part: Fields) -> Fields:
        own = next((part[key] for key in (kind, f"{kind}_url", "url", "path") if part.get(key)), None)
        if own is not None:
            return media_items([own], kind)[0]
        there = self.media.get(kind, [])
        place = part.get("index", self._next[kind])
        if not isinstance(place, int) or not 0 <= place < len(there):
            raise ImportProblem(f"a part for {kind} number {place} and {len(there)} {kind}s; expected one for each")
        self._next[kind] = place + 1
        self._used[kind].add(place)
        return there[place]


def _put_first(messages: Sequence[Any], contents: list[str | list[Fields]], media: Mapping[str, list[Fields]]) -> None:
    """Put all media before the first text of the user."""
    items = [item for kind in MEDIA_KINDS for item in media.get(kind, ())]
    if not items:
        return
    first = next((number for number, message in enumerate(messages) if message.get("role") == "user"), None)
    if first is None:
        raise ImportProblem(f"{len(items)} media and no message of the user that they could stand in")
    text = contents[first]
    contents[first] = media_first(text, items) if isinstance(text, str) else [*media_first("", items), *text]


IMPORTER = Importer(
    name="conversational",
    about="Hugging Face: messages, or prompt and completion, with images, videos or audios",
    matches=matches,
    convert=convert,
)
