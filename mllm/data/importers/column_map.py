"""Any table whose columns are not documented: `columns` of the source says what they hold.

| name            | holds                                                                                   |
|-----------------|-----------------------------------------------------------------------------------------|
| id              | the row's id                                                                            |
| system          | a system message                                                                        |
| question        | what the user says                                                                      |
| answer          | what the assistant says                                                                 |
| rationale       | what the assistant says before the answer, on lines of its own                          |
| messages        | in place of question and answer: a list of `role`/`content` or `from`/`value`           |
| image, video,   | the user's media: a path, bytes, a struct of both, or a list of these                   |
| audio           |                                                                                         |
| output_images   | images of the assistant's turns, what a model that draws would learn                    |
| chosen, rejected| in place of answer: a better and a worse one                                            |
| contrast        | media under which the better answer is the worse one                                    |

`<image>`, `<video>`, `<audio>` in the texts are where the media stand, one for each. Where the user's texts have none,
the media come first; where the assistant's texts have none, output images come last. What is not mapped goes to `meta`
if it is plain.

A mapped column must be there in every record, unless `optional` (a list of the names above) has it: a misspelt column
would else make rows without images, and nobody would know.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm.data.importers.base import Fields, Importer, ImportProblem, Record
from mllm.data.importers.placeholders import Content, fill
from mllm.data.importers.preferences import media_items, rest_of, text_of
from mllm.data.importers.questions import option
from mllm.data.sources import Source
from mllm.errors import OptionError

INPUTS = ("image", "video", "audio")
NAMES = (
    *("id", "system", "question", "answer", "rationale", "messages"),
    *(*INPUTS, "output_images", "chosen", "rejected", "contrast"),
)
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
OPTIONS: dict[str, Any] = {"optional": ()}

Cells = dict[str, Any]
Turn = tuple[str, str]
"""A role and a text."""


def matches(fields: Any, source: Source) -> bool:
    """Never by itself: what columns hold has to be said."""
    return False


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    cells = _cells(record.fields, source)
    turns = _turns(cells)
    inputs = {kind: media_items(cells.get(kind), kind) for kind in INPUTS}
    outputs = {"image": media_items(cells.get("output_images"))}
    messages, media = _messages(turns, inputs, outputs)
    name = cells.get("id")
    row: Fields = {
        "id": f"{record.number:08d}" if name is None or name == "" else str(name),
        "messages": messages,
        "media": media,
    }
    if "chosen" in cells:
        row |= {side: {"content": text_of(cells, side)} for side in ("chosen", "rejected")}
        if contrast := media_items(cells.get("contrast")):
            row["contrast"] = contrast
    if meta := rest_of(record.fields, tuple(source.columns.values())):
        row["meta"] = meta
    yield row


def _cells(fields: Any, source: Source) -> Cells:
    """The record's cells by what they hold; optional ones that are absent are left out.

    Raises:
        OptionError: The map itself cannot work.
        ImportProblem: The record lacks a column.
    """
    if not isinstance(fields, Mapping):
        raise ImportProblem(f"a {type(fields).__name__}; expected an object with columns")
    seen = f"the columns are {', '.join(map(str, fields))}"
    columns = source.columns
    if unknown := [name for name in columns if name not in NAMES]:
        raise OptionError(f"columns: {', '.join(unknown)}", expected=f"some of {', '.join(NAMES)}", do="correct them")
    has_answer = "messages" in columns or ({"question"} <= columns.keys() and {"answer", "chosen"} & columns.keys())
    if not has_answer or ("chosen" in columns) != ("rejected" in columns):
        raise OptionError(
            f"columns of {source.path} say where {', '.join(columns) or 'nothing'} is; {seen}",
            expected="messages; or question and answer; or question, chosen and rejected",
            do="map them under `columns` of the source, such as `columns: {question: prompt, answer: response}`",
        )
    optional = option(source, OPTIONS, "optional")
    missing = [
        f"{name}: {column}" for name, column in columns.items() if column not in fields and name not in optional
    ]
    if missing:
        raise ImportProblem(f"no column for {', '.join(missing)}; {seen}")
    return {name: fields[column] for name, column in columns.items() if column in fields}


def _turns(cells: Cells) -> list[Turn]:
    turns = [("system", text_of(cells, "system"))] if cells.get("system") else []
    if "messages" in cells:
        return turns + _listed_turns(cells["messages"])
    turns.append(("user", text_of(cells, "question")))
    if "chosen" in cells:
        return turns
    answer = text_of(cells, "answer")
    if cells.get("rationale"):
        answer = f"{text_of(cells, 'rationale')}\n\n{answer}"
    return [*turns, ("assistant", answer)]


def _listed_turns(messages: Any) -> list[Turn]:
    if not isinstance(messages, list | tuple) or not messages:
        raise ImportProblem(f"messages = {messages!r:.60}; expected a list of messages")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ImportProblem(f"message {message!r:.60}; expected an object")
        role, text = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in ROLES or not isinstance(text, str):
            raise ImportProblem(f"message {message!r:.60}; expected a role of {', '.join(ROLES)}, and a text")
        turns.append((ROLES[role], text))
    return turns


def _messages(
    turns: Sequence[Turn], inputs: Mapping[str, list[Fields]], outputs: Mapping[str, list[Fields]]
) -> tuple[list[Fields], list[Fields]]:
    """The messages, and all media in order of appearance."""
    asked = [turn for turn in turns if turn[0] != "assistant"]
    first = next((number for number, (role, _) in enumerate(asked) if role == "user"), 0)
    said = [text for role, text in turns if role == "assistant"]
    user = iter(_placed([text for _, text in asked], inputs, first=first))
    assistant = iter(_placed(said, outputs, first=None))
    messages, media = [], []
    for role, _ in turns:
        content, items = next(assistant if role == "assistant" else user)
        messages.append({"role": role, "content": content})
        media += items
    return messages, media


def _placed(
    texts: Sequence[str], media: Mapping[str, list[Fields]], *, first: int | None
) -> list[tuple[Content, list[Fields]]]:
    """Each text's content and its own media.

    Where no text has a placeholder string, the media stand before the text number `first`, or behind the last one.
    """
    every = [item for items in media.values() for item in items]
    has_strings = any(f"<{kind}>" in text for kind, items in media.items() if items for text in texts)
    if every and not has_strings:
        if not texts:
            raise ImportProblem(f"{len(every)} media and no text of their side; expected a message they belong to")
        placed: list[tuple[Content, list[Fields]]] = [(text, []) for text in texts]
        place = len(texts) - 1 if first is None else first
        shown = [{"type": item["kind"]} for item in every]
        words = [{"type": "text", "text": texts[place]}] if texts[place] else []
        placed[place] = (words + shown if first is None else shown + words, every)
        return placed
    contents, items = fill(texts, media)
    left = iter(items)
    counts = [
        0 if isinstance(content, str) else sum(part["type"] != "text" for part in content) for content in contents
    ]
    return [(content, [next(left) for _ in range(count)]) for content, count in zip(contents, counts, strict=True)]


IMPORTER = Importer(
    name="column_map",
    about="any table: `columns` of the source says which column holds question, answer, image, ...",
    matches=matches,
    convert=convert,
    options=OPTIONS,
)
