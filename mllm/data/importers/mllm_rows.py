"""Our own rows: JSONL with the keys of `mllm.data.schema`, and the parquet shards of `mllm.data.writers`."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mllm.data.importers.base import EmbeddedBytes, Fields, Importer, ImportProblem, Record
from mllm.data.schema import MEDIA_KINDS, ROW_KEYS
from mllm.data.sources import Source

_JSON_CELLS = ("messages", "chosen", "rejected", "contrast", "meta")


def matches(fields: Any, source: Source) -> bool:
    """Whether a record is a row: only our keys, and media or answers in the form that is ours alone.

    A row of text without the key `media` could be of other forms as well, and is left to them.
    """
    if not isinstance(fields, Mapping) or not {"id", "messages"} <= fields.keys() <= set(ROW_KEYS):
        return False
    media = fields.get("media")
    has_our_media = isinstance(media, list) and all(
        isinstance(item, Mapping) and item.get("kind") in MEDIA_KINDS for item in media
    )
    return has_our_media or (isinstance(fields.get("chosen"), Mapping) and "content" in fields["chosen"])


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """The row itself. What a JSONL file holds is checked by `parse_row`, not here."""
    if not isinstance(record.fields, Mapping):
        raise ImportProblem(f"a {type(record.fields).__name__}; expected an object with {', '.join(ROW_KEYS[:4])}")
    is_shard = isinstance(record.fields.get("messages"), str)
    fields = _of_shard(record.fields) if is_shard else dict(record.fields)
    if fields.get("id") is None:
        fields["id"] = f"{record.number:08d}"
    if not fields.get("source"):
        fields["source"] = source.name
    if not fields.get("coordinates") and source.coordinates:
        fields["coordinates"] = source.coordinates
    yield fields


def _of_shard(cells: Mapping[str, Any]) -> Fields:
    """A row of a parquet shard; see `mllm.data.writers.columns`."""
    fields: Fields = {key: cells.get(key) for key in ROW_KEYS}
    for key in _JSON_CELLS:
        try:
            fields[key] = None if fields[key] is None else json.loads(fields[key])
        except ValueError as error:
            raise ImportProblem(f"column {key}: {error}; expected JSON") from error
    media = [_media(item) for item in fields["media"] or []]
    sides = [side["media"] for key in ("chosen", "rejected") if (side := fields[key]) and "media" in side]
    sides += [fields["contrast"]] if fields["contrast"] is not None else []
    places = [place for side in sides for place in side]
    if any(not 0 <= place < len(media) for place in places):
        raise ImportProblem(f"media {places} of {len(media)}; expected places in the column `media`")
    for side in ("chosen", "rejected"):
        if fields[side] and "media" in fields[side]:
            fields[side]["media"] = [media[place] for place in fields[side]["media"]]
    if fields["contrast"] is not None:
        fields["contrast"] = [media[place] for place in fields["contrast"]]
    fields["media"] = media[: min(places, default=len(media))]
    return {key: value for key, value in fields.items() if value is not None}


def _media(item: Mapping[str, Any]) -> dict[str, Any]:
    """A media item, without the nulls that a table needs; a name beside embedded bytes is for messages alone."""
    kept = {key: value for key, value in item.items() if value is not None}
    if isinstance(kept.get("bytes"), EmbeddedBytes):
        kept.pop("path", None)
    return kept


IMPORTER = Importer(
    name="mllm",
    about="Rows of this project: JSONL in the form of mllm.data.schema, and its parquet shards.",
    matches=matches,
    convert=convert,
)
