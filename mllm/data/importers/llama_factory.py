"""LLaMA-Factory's data sets: alpaca and sharegpt records whose columns and tags a `dataset_info.json` names.

`llama_factory_info` says which entry of it. Without one, records with the keys of the alpaca form have its default
columns.

Read as LLaMA-Factory reads them: instruction and input are joined by a newline, users and assistants take turns, and
`<image>`, `<video>`, `<audio>` are as many as the lists of media, in the messages of both. What it only warns about is
an error here. Records with tools, and the unpaired ones of KTO, are left out and counted.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm.data.importers.base import Drop, Fields, Importer, ImportProblem, Record
from mllm.data.importers.llama_factory_info import OPTION, Entry, entry_of
from mllm.data.importers.placeholders import STRINGS, fill, holds_string
from mllm.data.importers.preferences import has_keys, media_items
from mllm.data.importers.questions import row_id
from mllm.data.sources import Source

MEDIA = {"image": "images", "video": "videos", "audio": "audios"}
TOOLS = "uses tools"
KTO = "one rated answer (KTO), no pair"

Turn = tuple[str, str]
"""A role and a text."""


def matches(fields: Any, source: Source) -> bool:
    """Whether the record has the default columns of the alpaca form; described sources are known without a look."""
    return has_keys(fields, "instruction", "output") and "audio_id" not in fields


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    entry, fields = entry_of(source), record.fields
    if not isinstance(fields, Mapping):
        raise ImportProblem(f"a {type(fields).__name__}; expected an object")
    if _cell(fields, entry, "tools"):
        raise Drop(TOOLS)
    if isinstance(_cell(fields, entry, "kto_tag"), bool):
        raise Drop(KTO)
    turns = _alpaca_turns(fields, entry) if entry.formatting == "alpaca" else _sharegpt_turns(fields, entry)
    media = _media(fields, entry, turns)
    contents, items = fill([text for _, text in turns], media)
    row: Fields = {
        "id": row_id(record),
        "messages": [{"role": role, "content": content} for (role, _), content in zip(turns, contents, strict=True)],
        "media": items,
    }
    if entry.is_ranking:
        for side in ("chosen", "rejected"):
            answer = _answer(_cell(fields, entry, side), side, entry)
            if holds_string(answer, media):
                raise ImportProblem(f"{side} holds a placeholder string; expected media in the prompt alone")
            row[side] = {"content": answer}
    yield row


def _alpaca_turns(fields: Mapping[str, Any], entry: Entry) -> list[Turn]:
    turns = _system(_cell(fields, entry, "system"))
    for pair in _cell(fields, entry, "history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ImportProblem(f"history holds {pair!r:.60}; expected pairs of a question and its answer")
        turns += [("user", _text(pair[0], "history")), ("assistant", _text(pair[1], "history"))]
    parts = [_cell(fields, entry, name) for name in ("prompt", "query")]
    question = "\n".join(_text(part, "the instruction") for part in parts if part)
    if not question:
        raise ImportProblem(f"no instruction; {_seen(fields, entry)}")
    turns.append(("user", question))
    if not entry.is_ranking:
        answer = _cell(fields, entry, "response")
        if not isinstance(answer, str):
            raise ImportProblem(f"the response is {answer!r:.60}; expected a text; {_seen(fields, entry)}")
        turns.append(("assistant", answer))
    return turns


def _sharegpt_turns(fields: Mapping[str, Any], entry: Entry) -> list[Turn]:
    tags = entry.tags
    messages = _cell(fields, entry, "messages")
    if not isinstance(messages, list | tuple) or not messages:
        raise ImportProblem(f"the messages are {messages!r:.60}; expected a list of them; {_seen(fields, entry)}")
    roles = {tags.get("user_tag"): "user", tags.get("assistant_tag"): "assistant", tags.get("system_tag"): "system"}
    roles.pop(None, None)
    turns = []
    for message in messages:
        if not has_keys(message, tags["role_tag"], tags["content_tag"]):
            raise ImportProblem(f"{message!r:.60}; expected the keys {tags['role_tag']} and {tags['content_tag']}")
        role = message[tags["role_tag"]]
        if role in (tags.get("observation_tag"), tags.get("function_tag")) and role is not None:
            raise Drop(TOOLS)
        if role not in roles:
            raise ImportProblem(f"{tags['role_tag']} = {role!r:.60}; expected one of {', '.join(map(str, roles))}")
        turns.append((roles[role], _text(message[tags["content_tag"]], tags["content_tag"])))
    if turns[0][0] != "system":
        turns = _system(_cell(fields, entry, "system")) + turns
    _check_turns([role for role, _ in turns], last="user" if entry.is_ranking else "assistant")
    return turns


def _check_turns(roles: Sequence[str], *, last: str) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(spoken)
    if list(spoken) != expected[: len(spoken)] or not spoken or spoken[-1] != last:
        raise ImportProblem(f"turns of {', '.join(roles)}; expected user, assistant, user, ..., {last}")


def _media(fields: Mapping[str, Any], entry: Entry, turns: Sequence[Turn]) -> dict[str, list[Fields]]:
    for kind, name in MEDIA.items():
        column = entry.columns.get(name)
        if column and column not in fields and any(STRINGS[kind] in text for _, text in turns):
            raise ImportProblem(f"{STRINGS[kind]} in the texts and no column {column!r}; {_seen(fields, entry)}")
    return {kind: media_items(_cell(fields, entry, name), kind) for kind, name in MEDIA.items()}


def _answer(value: Any, side: str, entry: Entry) -> str:
    if isinstance(value, Mapping):
        role = value.get(entry.tags["role_tag"])
        if role is not None and role == entry.tags.get("function_tag"):
            raise Drop(TOOLS)
        if role != entry.tags.get("assistant_tag"):
            raise ImportProblem(f"{side} is a message of {role!r:.40}; expected {entry.tags.get('assistant_tag')!r}")
        value = value.get(entry.tags["content_tag"])
    return _text(value, side)


def _system(text: Any) -> list[Turn]:
    return [("system", _text(text, "system"))] if text else []


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ImportProblem(f"{name} = {value!r:.60}; expected a text")
    return value


def _cell(fields: Mapping[str, Any], entry: Entry, name: str) -> Any:
    """What the record holds for a thing; None where the entry names no column for it, or the record leaves it out."""
    column = entry.columns.get(name)
    return fields.get(column) if column else None


def _seen(fields: Mapping[str, Any], entry: Entry) -> str:
    source = f"entry {entry.name!r}" if entry.name else "the default"
    return f"the columns are {', '.join(map(str, fields))}, {source} names {', '.join(entry.columns.values())}"


IMPORTER = Importer(
    name="llama_factory",
    about="LLaMA-Factory: alpaca or sharegpt records, described by the dataset_info.json beside them",
    matches=matches,
    convert=convert,
    options={OPTION: ""},
)
