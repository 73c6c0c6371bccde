"""Re-Align's `pref_data.json`: two conversations under one image, and a retrieved image to contrast it with.

`retrieved_image` becomes the row's contrast: media under which the chosen answer is dispreferred. Image names are
those of COCO's train2014 folder, without the folder.
"""

from collections.abc import Iterator
from typing import Any

from mllm.data.importers.base import Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import (
    LEFT_OUT,
    has_keys,
    is_messages,
    media_in_place,
    media_items,
    pair_row,
    prompt_of,
    rest_of,
)
from mllm.data.sources import Source

USED = ("id", "image", "retrieved_image", "chosen", "rejected")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record has Re-Align's keys; nobody else has a `retrieved_image`."""
    return has_keys(fields, "retrieved_image", "chosen", "rejected") and is_messages(fields["chosen"])


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row. Both sides repeat the prompt, and it must be the same.

    A record without a retrieved image stays a pair of texts, and says so in its meta.
    """
    fields = record.fields
    media, contrast = media_items(fields.get("image")), media_items(fields.get("retrieved_image"))
    prompt, chosen, rejected = prompt_of(fields["chosen"], fields["rejected"])
    meta = rest_of(fields, USED)
    if media and not contrast:
        meta[LEFT_OUT] = {"no retrieved image": 1}
    yield pair_row(
        record,
        messages=_messages(prompt, media),
        media=media,
        chosen=chosen,
        rejected=rejected,
        contrast=contrast,
        meta=meta,
    )


def _messages(prompt: list[Any], media: list[Fields]) -> list[Fields]:
    """The prompt's messages; the image belongs to the first message of the user."""
    if any(not isinstance(message["content"], str) for message in prompt):
        raise ImportProblem("a prompt whose content is no text; expected text with <image>")
    first = next((number for number, message in enumerate(prompt) if message["role"] == "user"), None)
    return [
        {
            "role": message["role"],
            "content": media_in_place(message["content"], media) if number == first else message["content"],
        }
        for number, message in enumerate(prompt)
    ]


IMPORTER = Importer(
    name="re_align",
    about="Re-Align pref_data.json: image, retrieved_image (becomes the contrast), chosen and rejected conversations",
    matches=matches,
    convert=convert,
)
