"""LLaVA's form: `conversations` of `from` and `value`, with `image` or `video` beside them.

ShareGPT4V, LLaVA-NeXT, LLaVA-Video and Qwen-VL's fine-tuning code write it, too. The rules:

1. `image`, `video` and `audio` hold a path or a list of paths (in parquet: bytes). An empty one is as good as none.
2. In the human's turns `<image>` stands for the next image, and so do `<video>` and `<audio>` for theirs. There are as
   many strings of a kind as media, or the record is a problem: LLaVA-1.5 would show one image for several strings, and
   nothing for none. In a record with videos and neither images nor `<video>`, `<image>` stands for the videos
   (LLaVA-Video).
3. Strings of a kind that the record has no media of are text. So are all strings in the answers, in which LLaVA-1.5
   would show the image.
4. The one medium of a turn goes to the front of it, and the text is stripped, as in LLaVA-1.5 and LLaVA-NeXT. Several
   stay where they are; the newline behind each is left to the chat template, which writes its own.
5. A first turn that is neither the human's nor the system's is dropped. Then users and assistants take turns.
6. A list of records (Qwen-VL's packed data) is several rows: packing is ours to do.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm.data.importers.base import Fields, Importer, ImportProblem, Record
from mllm.data.importers.messages import check_turns, conversation_row
from mllm.data.importers.placeholders import Content, fill
from mllm.data.importers.preferences import has_keys, media_items
from mllm.data.sources import Source

MEDIA = ("image", "video", "audio")
USED = (*MEDIA, "conversations", "system")
ELSEWHERE = ("images", "videos", "audios", "chosen", "rejected", "tools")
"""Keys of other forms that have `conversations`."""

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def matches(fields: Any, source: Source) -> bool:
    """Whether there are `conversations` of `from` and `value`, and no key is of another form."""
    if isinstance(fields, list):
        return bool(fields) and all(matches(entry, source) for entry in fields)
    return (
        has_keys(fields, "conversations")
        and not any(fields.get(key) for key in ELSEWHERE)
        and isinstance(fields["conversations"], list)
        and all(has_keys(turn, "from", "value") for turn in fields["conversations"])
    )


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row, or one for each record of a packed list."""
    if isinstance(record.fields, list):
        for part, fields in enumerate(record.fields):
            yield conversation(record, fields, part=part)
    else:
        yield conversation(record, record.fields)


def conversation(
    record: Record,
    fields: Any,
    *,
    media: Mapping[str, Sequence[Fields]] | None = None,
    part: int | None = None,
) -> Fields:
    """The row of one conversation.

    Args:
        record: Where it comes from.
        fields: In LLaVA's form.
        media: By kind, where they are not in the fields.
        part: Number of the conversation in a packed list.

    Raises:
        ImportProblem: A rule of this module is broken.
    """
    if not has_keys(fields, "conversations") or not isinstance(fields["conversations"], list):
        raise ImportProblem("no list of `conversations`; expected turns with `from` and `value`")
    if media is None:
        media = {kind: media_items(fields[kind], kind) for kind in MEDIA if fields.get(kind)}
    turns = _turns(fields)
    asked = [text for role, text in turns if role == "user"]
    if "video" in media and not media.get("image") and not any("<video>" in text for text in asked):
        asked = [text.replace("<image>", "<video>") for text in asked]
    contents, items = fill(asked, media)
    left = iter(contents)
    messages = [{"role": role, "content": _ordered(next(left)) if role == "user" else text} for role, text in turns]
    return conversation_row(record, fields, messages=messages, media=items, used=USED, part=part)


def _turns(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    turns = []
    for turn in fields["conversations"]:
        try:
            role, text = ROLES.get(turn["from"]), turn["value"]
        except (KeyError, TypeError, IndexError):
            raise ImportProblem(f"a turn {turn!r:.60}; expected `from` and `value`, texts") from None
        if role is None:
            raise ImportProblem(f"from = {turn['from']!r:.60}; expected one of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise ImportProblem(f"value = {text!r:.60}; expected a text")
        turns.append((role, text))
    if turns and turns[0][0] == "assistant":
        del turns[0]
    if fields.get("system") and isinstance(fields["system"], str) and turns and turns[0][0] != "system":
        turns.insert(0, ("system", fields["system"]))
    check_turns([role for role, _ in turns])
    return turns


def _ordered(content: Content) -> Content:
    """A turn with one medium begins with it."""
    if isinstance(content, str):
        return content
    media = [item for item in content if item["type"] != "text"]
    if len(media) > 1:
        return content
    text = "".join(item["text"] for item in content if item["type"] == "text").strip()
    return [*media, {"type": "text", "text": text}] if text else media


IMPORTER = Importer(
    name="llava",
    about="LLaVA, ShareGPT4V, LLaVA-NeXT, LLaVA-Video, Qwen-VL: conversations of from and value, with image or video",
    matches=matches,
    convert=convert,
)
