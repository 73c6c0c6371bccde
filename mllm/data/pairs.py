"""Preference rows as a model is trained on them: a few conversations, encoded, that share most of their media.

A pair has two sides at least: the better answer and the worse one. What a loss needs beside them are further sides:
the better answer under other media, or both under no picture at all (`mllm.data.contrasts`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mllm.data.contrasts import CHOSEN, CONTRAST, NONE, REJECTED, UNSEEN, Contrast, Shown, shown_by
from mllm.data.coordinates import CroppedAwayError, move_row
from mllm.data.examples import Example, Examples, encode_row, too_long, unusable
from mllm.data.left_out import BAD, LeftOut
from mllm.data.quarantine import Bad
from mllm.data.schema import Answer, MediaItem, PreferenceRow, Row
from mllm.errors import RowError
from mllm.processing import TrainingProcessor


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference, encoded.

    Args:
        row: The row.
        sides: Its conversations, in the order of `names_of_sides`; only the last answer of each is supervised.
        shown: All media of the sides; sides that show the same media share them.
        places: For each side, which of `shown` stand in it, in order: the same ones, or others altogether.
        position: Of the row in its mixture; -1 where it is of none.
    """

    row: PreferenceRow
    sides: tuple[Example, ...]
    shown: tuple[Shown, ...]
    places: tuple[tuple[int, ...], ...]
    position: int = -1

    @property
    def length(self) -> int:
        """Tokens of all sides."""
        return sum(side.length for side in self.sides)

    @property
    def media_items(self) -> tuple[MediaItem, ...]:
        """The media that a batch with this pair holds, those of several sides once."""
        return tuple(shown.item for shown in self.shown)


def names_of_sides(contrast: Contrast) -> tuple[str, ...]:
    """What the sides of every pair of a run are, in order."""
    names = [CHOSEN, REJECTED]
    if contrast.media != NONE:
        names.append(CONTRAST)
    if contrast.is_unseen_needed:
        names += [CHOSEN + UNSEEN, REJECTED + UNSEEN]
    return tuple(names)


def media_of_sides(row: PreferenceRow, contrast: Contrast) -> dict[str, tuple[Shown, ...]]:
    """What each side shows, by its name.

    Raises:
        RowError: The row lacks what it is to be contrasted with.
    """
    return {name: shown_by(row, name, contrast) for name in names_of_sides(contrast)}


def encode_pair(row: PreferenceRow, processor: TrainingProcessor, contrast: Contrast) -> Pair:
    """Encode every side; no file is opened.

    Raises:
        CroppedAwayError: A box marks what the encoder does not see.
        RowError: The row is malformed, has nothing to prefer, or lacks what it is to be contrasted with.
    """
    media = media_of_sides(row, contrast)
    moved = move_row(row, processor.image_geometry)
    assert isinstance(moved, PreferenceRow)
    _check_answers(moved, media[CHOSEN], media[REJECTED])
    # Shared by sides, not by items: some models see a picture differently beside another one.
    places: dict[tuple[Shown, ...], tuple[int, ...]] = {}
    sides: list[Example] = []
    shown: tuple[Shown, ...] = ()
    for name, of_side in media.items():
        answer = moved.rejected if name.startswith(REJECTED) else moved.chosen
        sides.append(_encode_side(moved, answer, of_side, processor))
        if of_side not in places:
            places[of_side] = tuple(range(len(shown), len(shown) + len(of_side)))
            shown += of_side
    return Pair(row, tuple(sides), shown, tuple(places[of_side] for of_side in media.values()))


def pair_of(
    row: Row,
    processor: TrainingProcessor,
    contrast: Contrast,
    *,
    max_length: int | None = None,
    overlong: str = "drop",
    position: int = -1,
) -> Pair | LeftOut:
    """A preference row as it is trained on, or why it is not; see `mllm.data.examples.example_of`.

    `max_length` is that of each side.
    """
    if not isinstance(row, PreferenceRow):
        return LeftOut(position, BAD, error=_no_preference(row), is_error=True)
    try:
        media = media_of_sides(row, contrast)
        if reason := unusable(row, [one.item for side in media.values() for one in side], processor):
            return LeftOut(position, reason)
        pair = encode_pair(row, processor, contrast)
    except CroppedAwayError:
        return LeftOut(position, "a box outside of what the encoder sees")
    except RowError as error:
        return LeftOut(position, BAD, bad=Bad(row.id, row.where, "", error.found), error=error)
    longest = max(side.length for side in pair.sides)
    if max_length is not None and longest > max_length:
        return too_long(row, longest, max_length, overlong=overlong, position=position)
    return replace(pair, position=position)


class Pairs(Examples):
    """The pairs that are trained on; see `Examples`, of which it has all arguments.

    A large mixture is measured by the longest side of each row, taken as often as there are sides.

    Args:
        contrast: What sides a pair has beside its two answers.
    """

    def __init__(self, *args: Any, contrast: Contrast, **kwargs: Any):
        self.contrast = contrast
        super().__init__(*args, **kwargs)
        if self.measure != "encoded":
            self.lengths = self.lengths * len(names_of_sides(contrast))

    def media_of(self, position: int) -> tuple[MediaItem, ...]:
        """The media that a batch with the row at this position of the mixture holds, see `Pair.media_items`.

        None of a row that turns out to be no pair, and will be left out when it is due.
        """
        row = self.rows[position]
        try:
            sides = media_of_sides(row, self.contrast).values() if isinstance(row, PreferenceRow) else ()
        except RowError:
            return ()
        return tuple(one.item for side in dict.fromkeys(sides) for one in side)

    def _example(self, position: int) -> Pair | LeftOut:
        return pair_of(
            self.rows[position],
            self.processor,
            self.contrast,
            max_length=self.max_length,
            overlong=self.overlong,
            position=position,
        )


def _encode_side(row: PreferenceRow, answer: Answer, shown: Sequence[Shown], processor: TrainingProcessor) -> Example:
    """One conversation, of which only the answer is supervised: what was said before is the same on all sides."""
    before = [{**message, "loss": False} if message["role"] == "assistant" else message for message in row.messages]
    messages = [*before, {"role": "assistant", "content": answer.content}]
    media = tuple(one.item for one in shown)
    side = Row(row.id, row.source, messages, media, row.where)
    return encode_row(side, processor)


def _check_answers(row: PreferenceRow, chosen_media: Sequence[Shown], rejected_media: Sequence[Shown]) -> None:
    texts = [_text_of(answer) for answer in (row.chosen, row.rejected)]
    for name, text in zip((CHOSEN, REJECTED), texts, strict=True):
        if not text.strip():
            raise RowError(
                f"{row.name}: the {name} answer is empty", expected="two answers with words", do="drop the row"
            )
    if texts[0] == texts[1] and tuple(chosen_media) == tuple(rejected_media):
        raise RowError(
            f"{row.name}: chosen and rejected are the same, {texts[0]!r:.60}",
            expected="two answers that differ, or the same one under different media",
            do="drop the row",
        )


def _text_of(answer: Answer) -> str:
    if isinstance(answer.content, str):
        return answer.content
    return "\n".join(item["text"] if item["type"] == "text" else f"<{item['type']}>" for item in answer.content)


def _no_preference(row: Row) -> RowError:
    return RowError(
        f"{row.name}: one conversation, and no preference",
        expected="rows with a chosen and a rejected answer",
        do="train on it with train/sft.py, or name other data",
    )
