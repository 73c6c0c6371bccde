"""Rows as the construction takes them: a conversation up to an answer of text, about one image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mllm.data.schema import MEDIA_KINDS, MediaItem, PreferenceRow, Row

NO_ANSWER = "its last message is no answer of text"
NOT_ONE_IMAGE = "it does not have exactly one image, and no other media"
OWN_MEDIA = "its chosen answer has media of its own"


class Unfit(Exception):
    """A row that no pair can be made of; the message says why, in words that a report counts."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A row, taken apart.

    Args:
        row: The row.
        messages: Up to the answer, as a row has them.
        answer: What is said next: the better answer of the pair to be.
        image: What it is about.
    """

    row: Row
    messages: list[dict[str, Any]]
    answer: str
    image: MediaItem

    def messages_with(self, image: Any) -> list[dict[str, Any]]:
        """The messages as `Chat` takes them, with this image (a path or bytes) in place of the row's."""
        return [
            {"role": message["role"], "content": _with_image(message["content"], image)} for message in self.messages
        ]


def take_apart(row: Row) -> Answered:
    """Take a row apart: of a preference the chosen answer counts, else the last message, which the assistant says.

    Raises:
        Unfit: It has no such answer, or another number of images than one.
    """
    if [item.kind for item in row.media] != ["image"]:
        raise Unfit(NOT_ONE_IMAGE)
    if isinstance(row, PreferenceRow):
        if row.chosen.media is not None:
            raise Unfit(OWN_MEDIA)
        messages, content = row.messages, row.chosen.content
    elif row.messages[-1]["role"] == "assistant":
        messages, content = row.messages[:-1], row.messages[-1]["content"]
    else:
        raise Unfit(NO_ANSWER)
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    answer = "".join(item.get("text") or "" for item in items)
    if not answer.strip() or any(item["type"] in MEDIA_KINDS for item in items):
        raise Unfit(NO_ANSWER)
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Answered(row, plain, answer, row.media[0])


def _with_image(content: str | Sequence[dict[str, Any]], image: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": "image", "image": image} if item["type"] == "image" else item for item in content]
