"""mDPO: an image's path, a prompt that is already written in a chat template, and two answers.

What mDPO's loss compares the image with, a small random crop of it, is made in training and is not in the data.
"""

import re
from collections.abc import Iterator
from typing import Any

from mllm.data.importers.base import Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import has_keys, media_in_place, media_items, pair_row, rest_of, text_of
from mllm.data.sources import Source

USED = ("img_path", "prompt", "chosen", "rejected", "id")
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA = re.compile(r"(?P<system>.*?)\s*USER: (?P<question>.*?)\s*ASSISTANT:\s*", re.DOTALL)
OTHER_TEMPLATE = re.compile(r"<\|im_start\|>|\[INST\]|<start_of_turn>|<\|start_header_id\|>|### ?Human:")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record has mDPO's keys; nobody else says `img_path` beside two answers."""
    return has_keys(fields, "img_path", "prompt", "chosen", "rejected")


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row, with the template taken off the prompt: the processor's own template comes in its place.

    A system prompt is kept, unless it is Vicuna's own. A prompt without `USER:` is taken as the question itself.
    """
    media = media_items(record.fields["img_path"])
    system, question = untemplated(text_of(record.fields, "prompt"))
    messages: list[Fields] = [{"role": "system", "content": system}] if system else []
    yield pair_row(
        record,
        messages=[*messages, {"role": "user", "content": media_in_place(question, media)}],
        media=media,
        chosen=text_of(record.fields, "chosen"),
        rejected=text_of(record.fields, "rejected"),
        meta=rest_of(record.fields, USED),
    )


def untemplated(prompt: str) -> tuple[str, str]:
    """System prompt, "" for none or Vicuna's own, and question of a templated prompt.

    Raises:
        ImportProblem: The prompt has several turns, or another template than Vicuna's.
    """
    if OTHER_TEMPLATE.search(prompt):
        raise ImportProblem(f"prompt = {prompt!r:.60}; expected Vicuna's template (USER: ... ASSISTANT:), or none")
    if "USER: " not in prompt:
        return "", prompt
    found = VICUNA.fullmatch(prompt)
    if not found or "ASSISTANT:" in found["question"]:
        raise ImportProblem("a prompt of several turns; expected one, USER: ... ASSISTANT:")
    system = found["system"].strip()
    return "" if system == VICUNA_SYSTEM else system, found["question"]


IMPORTER = Importer(
    name="mdpo",
    about="mDPO: JSON with img_path, prompt (in Vicuna's template, with <image>), chosen, rejected",
    matches=matches,
    convert=convert,
)
