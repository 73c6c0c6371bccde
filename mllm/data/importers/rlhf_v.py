"""RLHF-V-Dataset: parquet whose `text` is a JSON string with question and answers; also the TSV of the authors' code.

The TSV's seven columns are those of the parquet: ds_name, image, text, origin_dataset, origin_split, idx, image_path.
Image, text and origin_split are in base64, and its text is a list [question, chosen, rejected]. The code writes it
without a header: write one, with these names, as its first line.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

from mllm.data.importers.base import EmbeddedBytes, Fields, Importer, ImportProblem, Record
from mllm.data.importers.preferences import has_keys, media_first, media_items, pair_row, rest_of, text_of
from mllm.data.sources import Source

ENCODED = ("image", "text", "origin_split")
"""Columns of the TSV that are in base64."""

USED = ("image", "text", "idx")
ANSWERS = ("question", "chosen", "rejected")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record has RLHF-V's columns; nobody else has a `text` beside them."""
    return has_keys(fields, "text", "origin_dataset", "origin_split", "image_path")


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row; the image stands in front of the question, where the authors' code puts it."""
    fields = record.fields
    said = _json(fields.get("text"))
    if said is None:
        fields = _decoded(fields)
        said = _json(fields["text"])
    if isinstance(said, list) and len(said) == len(ANSWERS):
        said = dict(zip(ANSWERS, said, strict=True))
    if not isinstance(said, Mapping):
        raise ImportProblem(f"text = {fields['text']!r:.60}; expected JSON with question, chosen and rejected")
    media = media_items(fields.get("image"))
    yield pair_row(
        Record(fields, record.where, record.number),
        id_key="idx",
        messages=[{"role": "user", "content": media_first(text_of(said, "question"), media)}],
        media=media,
        chosen=text_of(said, "chosen"),
        rejected=text_of(said, "rejected"),
        meta=rest_of(fields, USED),
    )


def _json(text: Any) -> Any:
    """The value a text is the JSON of, None for a text that is no JSON."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return None


def _decoded(fields: Mapping[str, Any]) -> Fields:
    """A line of the TSV, out of base64."""
    try:
        image, text, origin = (base64.b64decode(fields[key], validate=True) for key in ENCODED)
        return {
            **fields,
            "image": EmbeddedBytes(image, name=str(fields.get("image_path") or "")),
            "text": text.decode("utf-8"),
            "origin_split": origin.decode("utf-8"),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ImportProblem(f"text = {fields.get('text')!r:.60}; expected JSON, or base64 of it") from error


IMPORTER = Importer(
    name="rlhf_v",
    about="RLHF-V-Dataset: parquet with image, text (JSON: question, chosen, rejected), idx; or the code's TSV",
    matches=matches,
    convert=convert,
)
