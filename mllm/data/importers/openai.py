"""OpenAI's chat form: `messages` whose parts hold their media: `image_url`, `input_audio`, `video_url`.

A URL is a path (or `file://`), or base64 data. Remote ones have to be downloaded first: rows that depend on somebody
else's server are not the same tomorrow. An assistant's message of `weight` 0 is not learned.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from mllm.data.importers.base import EmbeddedBytes, Fields, Importer, ImportProblem, Record
from mllm.data.importers.messages import ROLES, conversation_row, parts_of
from mllm.data.importers.preferences import has_keys, is_messages
from mllm.data.sources import Source

URL_PARTS = {"image_url": "image", "audio_url": "audio", "video_url": "video"}


def matches(fields: Any, source: Source) -> bool:
    """Whether a part of the messages is one that only this form has."""
    if not has_keys(fields, "messages") or not is_messages(fields["messages"]):
        return False
    contents = (message["content"] for message in fields["messages"] if isinstance(message["content"], list))
    parts = (part for content in contents for part in content if isinstance(part, Mapping))
    return any(part.get("type") in URL_PARTS or part.get("type") == "input_audio" for part in parts)


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    fields = record.fields
    if not has_keys(fields, "messages") or not is_messages(fields["messages"]):
        raise ImportProblem("no `messages`; expected a list of messages with `role` and `content`")
    media: list[Fields] = []
    messages = [_message(message, media) for message in fields["messages"]]
    yield conversation_row(record, fields, messages=messages, media=media, used=("messages",))


def _message(message: Mapping[str, Any], media: list[Fields]) -> Fields:
    role, content = message["role"], message["content"]
    if role not in ROLES or message.get("tool_calls"):
        raise ImportProblem(f"a message of role {role!r:.40}; expected {', '.join(ROLES)}, without tool calls")
    made: Fields = {"role": ROLES[role], "content": content}
    if message.get("weight") is not None:
        made["loss"] = message["weight"]
    if isinstance(content, list):
        made["content"] = [_item(part, media) for part in parts_of(content)]
    elif not isinstance(content, str):
        raise ImportProblem(f"content = {content!r:.60}; expected a text, or a list of parts")
    return made


def _item(part: Fields, media: list[Fields]) -> Fields:
    """A content item; its medium is added to the list."""
    kind, value = part["type"], part.get(part["type"])
    if kind == "text":
        if not isinstance(value, str):
            raise ImportProblem(f"text = {value!r:.60}; expected a text")
        return {"type": "text", "text": value}
    if kind in URL_PARTS:
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str) or not url:
            raise ImportProblem(f"{kind} = {value!r:.60}; expected a URL, or an object with `url`")
        media.append({"kind": URL_PARTS[kind], **_medium(url)})
        return {"type": URL_PARTS[kind]}
    if kind == "input_audio" and isinstance(value, Mapping) and "data" in value:
        media.append({"kind": "audio", "bytes": EmbeddedBytes(_from_base64(value["data"]), name="input_audio")})
        return {"type": "audio"}
    raise ImportProblem(f"a part {part!r:.60}; expected type text, {', '.join(URL_PARTS)} or input_audio")


def _medium(url: str) -> Fields:
    """`path` or `bytes` of a media item."""
    head, comma, data = url.partition(",")
    if head.startswith("data:"):
        if not comma or not head.endswith(";base64"):
            raise ImportProblem(f"{head[:60]!r}; expected data in base64: data:image/png;base64,...")
        return {"bytes": EmbeddedBytes(_from_base64(data), name=head)}
    if url.startswith("file://"):
        return {"path": unquote(urlsplit(url).path)}
    if "://" in url:
        raise ImportProblem(f"the remote file {url[:100]!r}; expected a local one: download it first, name its path")
    return {"path": url}


def _from_base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ImportProblem(f"data in base64 that cannot be decoded: {error}") from error


IMPORTER = Importer(
    name="openai",
    about="OpenAI chat: messages with image_url (a path or base64 data), input_audio, video_url",
    matches=matches,
    convert=convert,
)
