"""Strings such as `<image>` in the texts of a conversation, for forms that list the media beside it by kind."""

import re
from collections.abc import Mapping, Sequence

from mllm.data.importers.base import Fields, ImportProblem

STRINGS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}

Content = str | list[Fields]


def fill(texts: Sequence[str], media: Mapping[str, Sequence[Fields]]) -> tuple[list[Content], list[Fields]]:
    """Put content items where the strings stand.

    A kind without media has no strings: then they are text. The newline behind a string belongs to it, for chat
    templates write their own.

    Args:
        texts: The texts of a conversation, in order.
        media: The media of each kind, in order.

    Returns:
        The contents, and the media in order of appearance.

    Raises:
        ImportProblem: There are more or fewer strings of a kind than media.
    """
    kinds = [kind for kind, items in media.items() if items]
    if not kinds:
        return list(texts), []
    pattern = re.compile("<(" + "|".join(kinds) + ")>\n?")
    found = [kind for text in texts for kind in pattern.findall(text)]
    for kind in kinds:
        if found.count(kind) != len(media[kind]):
            raise ImportProblem(
                f"{found.count(kind)} strings {STRINGS[kind]} in the texts and {len(media[kind])} {kind}s; "
                "expected one string for each"
            )
    left = {kind: iter(media[kind]) for kind in kinds}
    return [_items(pattern, text) for text in texts], [next(left[kind]) for kind in found]


def holds_string(text: str, media: Mapping[str, Sequence[Fields]]) -> bool:
    """Whether a text holds a string of a kind that there are media of."""
    return any(items and STRINGS[kind] in text for kind, items in media.items())


def _items(pattern: re.Pattern[str], text: str) -> Content:
    parts = pattern.split(text)  # text, kind, text, kind, ..., text
    if len(parts) == 1:
        return text
    items = [{"type": part} if number % 2 else {"type": "text", "text": part} for number, part in enumerate(parts)]
    return [item for item in items if item.get("text") != ""]
