"""The Cauldron and FineVision: `images`, and `texts` of `user` and `assistant`.

All images stand before the first question; strings such as `<image>` in the texts are text. FineVision rates each turn
from 1 to 5: turns below a given rating are left out, and records of which no turn is left.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mllm.data.importers.base import Drop, Fields, Importer, ImportProblem, Record
from mllm.data.importers.messages import conversation_row
from mllm.data.importers.preferences import LEFT_OUT, has_keys, media_first, media_items
from mllm.data.sources import Source
from mllm.errors import OptionError

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
USED = ("images", "texts", *(f"{name}_{end}" for name in RATINGS for end in ("ratings", "min")))


def matches(fields: Any, source: Source) -> bool:
    """Whether there are `images`, and `texts` of `user` and `assistant`."""
    return (
        has_keys(fields, "texts")
        and isinstance(fields["texts"], list)
        and bool(fields["texts"])
        and all(has_keys(turn, "user", "assistant") for turn in fields["texts"])
    )


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """One row: the texts as the turns of one conversation."""
    fields = record.fields
    if not has_keys(fields, "texts") or not isinstance(fields["texts"], list) or not fields["texts"]:
        raise ImportProblem("no `texts`; expected a list of `user` and `assistant`")
    media = media_items(fields.get("images"), "image")
    messages: list[Fields] = []
    left_out: dict[str, int] = {}
    for number, turn in enumerate(fields["texts"]):
        if reason := _too_low(fields, number, source):
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        question, answer = (_text(turn, key) for key in ("user", "assistant"))
        content = media_first(question, media) if media and not messages else question
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    if not messages:
        raise Drop(next(iter(left_out)))
    row = conversation_row(record, fields, messages=messages, media=media, used=USED)
    origin = fields["texts"][0].get("source")
    if "source" not in row and isinstance(origin, str):
        row["source"] = origin
    if left_out:
        row.setdefault("meta", {})[LEFT_OUT] = left_out
    yield row


def _text(turn: Any, key: str) -> str:
    value = turn.get(key) if isinstance(turn, Mapping) else None
    if not isinstance(value, str):
        raise ImportProblem(f"{key} = {value!r:.60}; expected a text")
    return value


def _too_low(fields: Mapping[str, Any], number: int, source: Source) -> str:
    """Why a turn is left out; "" if it is not. A turn without a rating stays."""
    for name in RATINGS:
        least = source.options.get(f"min_{name}", 0)
        if not isinstance(least, int | float):
            raise OptionError(f"min_{name} = {least!r}", expected="a rating from 1 to 5, or 0", do="correct it")
        ratings = fields.get(f"{name}_ratings")
        rating = ratings[number] if isinstance(ratings, list) and number < len(ratings) else None
        if isinstance(rating, int | float) and rating < least:
            return f"turn rated below min_{name} = {least}"
    return ""


IMPORTER = Importer(
    name="cauldron",
    about="The Cauldron and FineVision: images, and texts of user and assistant, with embedded bytes",
    matches=matches,
    convert=convert,
    options={f"min_{name}": 0 for name in RATINGS},
)
