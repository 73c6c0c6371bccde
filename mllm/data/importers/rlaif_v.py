"""RLAIF-V-Dataset: parquet with the image's bytes, a question and two answers in columns."""

from collections.abc import Iterator
from typing import Any

from mllm.data.importers.base import Fields, Importer, Record
from mllm.data.importers.preferences import has_keys, media_first, media_items, pair_row, rest_of, text_of
from mllm.data.sources import Source

USED = ("image", "question", "chosen", "rejected", "idx")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record has RLAIF-V's columns; without `origin_dataset` it would be MPO's form."""
    return has_keys(fields, "question", "chosen", "rejected", "origin_dataset")


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row; the image stands in front of the question, where the authors' code puts it."""
    media = media_items(record.fields.get("image"))
    yield pair_row(
        record,
        id_key="idx",
        messages=[{"role": "user", "content": media_first(text_of(record.fields, "question"), media)}],
        media=media,
        chosen=text_of(record.fields, "chosen"),
        rejected=text_of(record.fields, "rejected"),
        meta=rest_of(record.fields, USED),
    )


IMPORTER = Importer(
    name="rlaif_v",
    about="RLAIF-V-Dataset: parquet with image, question, chosen, rejected, origin_dataset, idx",
    matches=matches,
    convert=convert,
)
