"""WebDataset shards: media and texts of one key, a record.

What the conversation is, is told by the first of these that the key has:

- `json` with `conversations` (LLaVA's form) or `messages` (Hugging Face's): under these forms' rules. Media that it
  names are the key's members of that name or suffix; a single one whatever its name; without names, all, in order.
- `txt`, `text` or `caption`; or a text in `json` under the name in `columns: {caption: NAME}` (by default `caption`):
  the answer to a question that shows the media, with the words of the option `question`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mllm.data.importers import conversational, llava
from mllm.data.importers.base import EmbeddedBytes, Fields, Importer, ImportProblem, Record
from mllm.data.importers.messages import MEDIA, conversation_row
from mllm.data.importers.preferences import has_keys, media_first
from mllm.data.sources import Source

KEY = "__key__"
"""Where a record holds what the names of its members have in common."""

SUFFIXES = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "video": ("mp4", "webm", "mkv", "mov", "avi"),
    "audio": ("wav", "flac", "mp3", "ogg", "m4a", "opus"),
}
TEXTS = ("txt", "text", "caption")

_KINDS = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}


def matches(fields: Any, source: Source) -> bool:
    """Whether the record comes out of a tar."""
    return has_keys(fields, KEY)


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    members = record.fields
    if not has_keys(members, KEY):
        raise ImportProblem("no members of a tar; expected WebDataset shards")
    media: dict[str, list[Fields]] = {}
    for suffix, data in members.items():
        kind = _KINDS.get(suffix.rpartition(".")[2])
        if kind and isinstance(data, EmbeddedBytes):
            media.setdefault(kind, []).append({"kind": kind, "bytes": data})
    said = members.get("json")
    fields = {"id": members[KEY], **said} if isinstance(said, Mapping) else {"id": members[KEY]}
    if has_keys(fields, "conversations"):
        yield llava.conversation(record, fields, media=_named_media(fields, media))
    elif has_keys(fields, "messages"):
        messages = conversational.message_list(fields["messages"], "messages")
        yield conversational.conversation(record, fields, messages=messages, media=_named_media(fields, media))
    else:
        yield _caption_row(record, fields, media, source)


def _caption_row(
    record: Record, fields: Mapping[str, Any], media: Mapping[str, list[Fields]], source: Source
) -> Fields:
    name = source.columns.get("caption", "caption")
    texts = [record.fields.get(key) for key in TEXTS] + [fields.get(name)]
    caption = next((text for text in texts if isinstance(text, str)), None)
    items = [item for found in media.values() for item in found]
    if caption is None or not items:
        seen = ", ".join(key for key in record.fields if key != KEY)
        keys = f", and json with the keys {', '.join(fields)}" if len(fields) > 1 else ""
        raise ImportProblem(f"members {seen}{keys}; expected media with txt, or json with a conversation or {name!r}")
    question = media_first(str(source.options.get("question", "")), items)
    messages: list[Fields] = [{"role": "user", "content": question}, {"role": "assistant", "content": caption.strip()}]
    return conversation_row(record, fields, messages=messages, media=items, used=(name, *MEDIA))


def _named_media(fields: Mapping[str, Any], media: Mapping[str, list[Fields]]) -> dict[str, list[Fields]]:
    """The members in the order in which the conversation names them; in their own where it does not."""
    ordered = dict(media)
    for key, kind in MEDIA.items():
        names = fields.get(key)
        if not names:
            continue
        names = names if isinstance(names, list) else [names]
        there = media.get(kind, [])
        if len(names) > 1 or len(there) != 1:  # one name of one member needs no comparison
            ordered[kind] = [_member(name, kind, there) for name in names]
    return ordered


def _member(name: Any, kind: str, there: list[Fields]) -> Fields:
    if isinstance(name, str):
        last = name.rpartition("/")[2]
        for item in there:
            member = item["bytes"].name.rpartition("/")[2]
            if last == member or last == member.partition(".")[2]:
                return item
    seen = ", ".join(item["bytes"].name for item in there) or "none"
    raise ImportProblem(f"the {kind} {name!r:.80}, and of the key's members {seen}; expected one of that name")


IMPORTER = Importer(
    name="webdataset",
    about="WebDataset tars: images, videos or audio with txt or json (a LLaVA or Hugging Face conversation) per key",
    matches=matches,
    convert=convert,
    options={"question": ""},
)
