"""TRL's preference form: prompt, chosen and rejected, as messages or as strings, with `images` or `image`.

The prompt stands apart (explicit), or both sides repeat it in front of their last message (implicit). Messages hold a
string or a list of parts; where all are strings, the images come before the first message of the user, as in TRL.
Other trainers write the same keys with `<image>` or `<video>` in a prompt that is a string, and that is read, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm.data.importers.base import Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import (
    answer_of,
    has_keys,
    is_messages,
    media_first,
    media_in_place,
    media_items,
    pair_row,
    prompt_of,
    rest_of,
    text_of,
)
from mllm.data.sources import Source

MEDIA = {"images": "image", "image": "image", "videos": "video", "video": "video"}
USED = ("id", "prompt", "chosen", "rejected", *MEDIA)
ELSEWHERE = ("retrieved_image", "img_path", "question", "messages", "conversations", "completions")
"""Keys of other preference forms."""


def matches(fields: Any, source: Source) -> bool:
    """Whether chosen and rejected are messages, or texts that answer a prompt, and no key is of another form."""
    if not has_keys(fields, "chosen", "rejected") or any(key in fields for key in ELSEWHERE):
        return False
    sides = (fields["chosen"], fields["rejected"])
    if all(is_messages(side) for side in sides):
        return True
    return fields.get("prompt") is not None and all(isinstance(side, str) for side in sides)


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row."""
    fields = record.fields
    media = [item for key, kind in MEDIA.items() for item in media_items(fields.get(key), kind)]
    prompt, chosen, rejected = _sides(fields)
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": media_in_place(prompt, media, first_if_unnamed=True)}]
    else:
        messages = _messages(prompt, media)
    yield pair_row(
        record,
        messages=messages,
        media=media,
        chosen=chosen,
        rejected=rejected,
        meta=rest_of(fields, USED),
    )


def _sides(fields: Fields) -> tuple[Any, str, str]:
    """The prompt, a text or messages, and the two answers."""
    prompt, chosen, rejected = fields.get("prompt"), fields.get("chosen"), fields.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            raise ImportProblem("two texts without a prompt; expected `prompt`: where it ends cannot be seen in them")
        if not isinstance(prompt, str) and not is_messages(prompt):
            raise ImportProblem(f"prompt = {prompt!r:.60}; expected a text or a list of messages")
        question = text_of(fields, "prompt") if isinstance(prompt, str) else prompt
        return question, text_of(fields, "chosen"), text_of(fields, "rejected")
    if is_messages(prompt):
        answers = []
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            if not isinstance(side, list) or len(side) != 1 or not is_messages(side):
                raise ImportProblem(f"{name} = {side!r:.60}; expected one message: the prompt stands apart")
            answers.append(answer_of(side, name))
        return prompt, answers[0], answers[1]
    return prompt_of(chosen, rejected)  # beside which TRL, too, does not look at a `prompt` that is a text


def _messages(prompt: Sequence[Mapping[str, Any]], media: list[Fields]) -> list[Fields]:
    """The prompt's messages with their media as content items; `None` keys, which Arrow adds, are left away."""
    contents = [_content(message["content"]) for message in prompt]
    has_media_parts = any(
        item["type"] != "text" for content in contents if isinstance(content, list) for item in content
    )
    first = next((number for number, message in enumerate(prompt) if message["role"] == "user"), None)
    if media and not has_media_parts and first is not None:
        text = contents[first]
        if isinstance(text, str):  # among parts, a missing image is an error, which the row's checks find
            contents[first] = media_first(text, media)
    return [{"role": message["role"], "content": content} for message, content in zip(prompt, contents, strict=True)]


def _content(content: Any) -> str | list[Fields]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ImportProblem(f"content = {content!r:.60}; expected a text or a list of parts")
    items: list[Fields] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            items.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "video"):
            items.append({"type": kind})
        else:
            raise ImportProblem(f"a part {part!r:.60}; expected type text, image or video")
    return items


IMPORTER = Importer(
    name="preference_trl",
    about="TRL preference: prompt (or implicit), chosen, rejected as messages or strings, with images or image",
    matches=matches,
    convert=convert,
)
