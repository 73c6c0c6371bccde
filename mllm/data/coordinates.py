"""Boxes written in a text move with the image, so that they mark what the model sees. Pure.

A box is four numbers in brackets, left, top, right, bottom: `[0.12, 0.3, 0.5, 0.66]`, or `[77, 144, 320, 317]`. How a
source writes them is declared (`mllm.data.schema.COORDINATES`); it cannot be told from the numbers.

What the model shall read and write is by default "seen": shares of the square that its encoder sees, as LLaVA has
them. Two decimals where the source wrote shares with at most two, else three. Numbers that do not change are left as
they are written.

Four numbers in brackets are no box, and stay as they are, where right is left of left or bottom above top, where both
extents are 0, where one lies more than 2 % outside the image, or where a source of shares wrote no decimal point.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from mllm.data.schema import COORDINATES, Answer, MediaItem, PreferenceRow, Row
from mllm.errors import OptionError, RowError
from mllm.processing.geometry import GEOMETRIES

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

FORMS = (*COORDINATES, "seen")
TOLERANCE = 0.02
"""How far outside the image, as a share of its side, an annotator's box may lie; it is cut to the image."""

_NUMBER = r"\s{0,3}(-?\d{1,6}(?:\.\d{1,17})?)\s{0,3}"
BOX_PATTERN = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
"""Four numbers in brackets, each of them a group."""

_WITH_DECIMALS = ("unit", "padded_unit", "seen")


class CroppedAwayError(RowError):
    """A box marks what the centre crop cuts off, so the model could not see what the text speaks of."""


def move_row(row: Row, geometry: str | None) -> Row:
    """The row with its boxes in the coordinates of the square that the encoder sees; the row itself if it has none.

    A box belongs to the last image or video that stands before it in the conversation, or to the first one where none
    stands before it. The answers of a preference move with their own side's media where they have some.

    Args:
        row: Its `coordinates` say how its boxes are written; the result's are "", since nothing is left to move.
        geometry: How an image becomes the encoder's square: "pad", "crop" or "squash".

    Raises:
        CroppedAwayError: A box lies wholly outside the centre crop. A reason to drop the row.
        OptionError: There are boxes to move, and no geometry.
    """
    sizes = [(item.height, item.width) for item in row.media if item.height]
    if not row.coordinates or not sizes:
        return row
    mover = _Mover(row.coordinates, _checked(geometry), row.name)
    messages, seen = [], 0
    for message in row.messages:
        content, seen = mover.content(message["content"], sizes, seen)
        messages.append({**message, "content": content})
    fields: dict[str, Any] = {"messages": messages, "coordinates": ""}
    if isinstance(row, PreferenceRow):
        fields["chosen"] = _moved_answer(row.chosen, mover, row.media, seen)
        fields["rejected"] = _moved_answer(row.rejected, mover, row.media, seen)
    return dataclasses.replace(row, **fields)


def move_boxes(
    text: str,
    *,
    declared: str,
    to: str = "seen",
    size: tuple[int, int],
    geometry: str,
    where: str = "the text",
) -> str:
    """The text with every box rewritten; all else stays, letter by letter.

    Example: in an image 100 high and 200 wide, "the cup [0.5, 0.5, 1.0, 1.0]" declared as "unit" becomes
    "the cup [0.5, 0.5, 1.0, 0.75]" for an encoder that sees the image padded to a square.

    Args:
        text: Anything.
        declared: How its boxes are written, one of `FORMS`.
        to: How they shall be written.
        size: Height and width of the upright image in pixels.
        geometry: How the image becomes the square that "seen" speaks of.
        where: Names the row in errors.

    Raises:
        CroppedAwayError: `to` is "seen", and a box lies wholly outside what is seen.
    """

    def rewrite(match: re.Match[str]) -> str:
        written = match.groups()
        box = (float(written[0]), float(written[1]), float(written[2]), float(written[3]))
        if declared in _WITH_DECIMALS and not any("." in number for number in written):
            return match[0]
        pixels = to_pixels(box, form=declared, size=size, geometry=geometry)
        if not _is_box(pixels, size):
            return match[0]
        moved = from_pixels(_cut(pixels, float(size[1]), float(size[0])), form=to, size=size, geometry=geometry)
        if to == "seen":
            moved = _cut_to_seen(moved, match[0], where)
        return _write(match, moved, _num_decimals(written, declared, to))

    return BOX_PATTERN.sub(rewrite, text)


def to_pixels(box: Box, *, form: str, size: tuple[int, int], geometry: str) -> Box:
    """A box in one of `FORMS` as pixels of the upright image, unrounded."""
    (x_scale, x_shift), (y_scale, y_shift) = _map_to_pixels(form, size, geometry)
    left, top, right, bottom = box
    return (
        left * x_scale + x_shift,
        top * y_scale + y_shift,
        right * x_scale + x_shift,
        bottom * y_scale + y_shift,
    )


def from_pixels(box: Box, *, form: str, size: tuple[int, int], geometry: str) -> Box:
    """The inverse of `to_pixels`."""
    (x_scale, x_shift), (y_scale, y_shift) = _map_to_pixels(form, size, geometry)
    left, top, right, bottom = box
    return (
        (left - x_shift) / x_scale,
        (top - y_shift) / y_scale,
        (right - x_shift) / x_scale,
        (bottom - y_shift) / y_scale,
    )


def _map_to_pixels(form: str, size: tuple[int, int], geometry: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Scale and shift of x and of y. Centres fall on whole pixels when padding, as in `mllm.processing.geometry`.

    Cropping there resizes first and rounds the longer side: what is seen differs from this by less than a pixel of
    the encoder's square.
    """
    height, width = size
    if form == "seen":
        form = {"pad": "padded_unit", "crop": "cropped_unit", "squash": "unit"}[geometry]
    if form == "pixel":
        return (1.0, 0.0), (1.0, 0.0)
    if form == "unit":
        return (float(width), 0.0), (float(height), 0.0)
    if form == "thousandths":
        return (width / 1000, 0.0), (height / 1000, 0.0)
    if form == "padded_unit":
        side = max(size)
        return (float(side), -float((side - width) // 2)), (float(side), -float((side - height) // 2))
    side = min(size)
    return (float(side), (width - side) / 2), (float(side), (height - side) / 2)


def _is_box(pixels: Box, size: tuple[int, int]) -> bool:
    height, width = size
    left, top, right, bottom = pixels
    if left > right or top > bottom or (left == right and top == bottom):
        return False
    x_slack, y_slack = width * TOLERANCE, height * TOLERANCE
    return left >= -x_slack and right <= width + x_slack and top >= -y_slack and bottom <= height + y_slack


def _cut(box: Box, width: float, height: float) -> Box:
    left, top, right, bottom = box
    return (
        min(max(left, 0.0), width),
        min(max(top, 0.0), height),
        min(max(right, 0.0), width),
        min(max(bottom, 0.0), height),
    )


def _cut_to_seen(box: Box, written: str, where: str) -> Box:
    left, top, right, bottom = box
    if right <= 0 or bottom <= 0 or left >= 1 or top >= 1:
        raise CroppedAwayError(
            f"{where}: the box {written} lies outside the centre of the image, which is all that the encoder sees",
            expected="boxes that reach into what is seen",
            do="use `geometry: pad` or `squash`, or drop the row",
        )
    return _cut(box, 1.0, 1.0)


def _num_decimals(written: Sequence[str], declared: str, to: str) -> int:
    if to not in _WITH_DECIMALS:
        return 0
    if declared not in _WITH_DECIMALS:
        return 3
    return min(max(2, *(len(number.partition(".")[2]) for number in written)), 3)


def _write(match: re.Match[str], box: Box, decimals: int) -> str:
    """The box in the place of the old one: only the numbers are replaced, blanks stay."""
    text, start = "", match.start()
    for group, value in enumerate(box, start=1):
        rounded = round(value, decimals) + 0.0  # no minus before a 0
        number = str(rounded) if decimals else str(int(rounded))
        same = float(match[group]) == rounded and bool(decimals) == ("." in match[group])
        text += match.string[start : match.start(group)] + (match[group] if same else number)
        start = match.end(group)
    return text + match.string[start : match.end()]


class _Mover:
    """Moves the boxes of one row's contents."""

    def __init__(self, declared: str, geometry: str, where: str):
        self.declared, self.geometry, self.where = declared, geometry, where

    def content(self, content: Any, sizes: Sequence[tuple[int, int]], seen: int) -> tuple[Any, int]:
        """A message's content with moved boxes, and how many media stand before what follows it."""
        if isinstance(content, str):
            return self._text(content, sizes, seen), seen
        items = []
        for item in content:
            if item["type"] == "text":
                items.append({**item, "text": self._text(item["text"], sizes, seen)})
                continue
            items.append(item)
            seen += item["type"] != "audio"
        return items, seen

    def _text(self, text: str, sizes: Sequence[tuple[int, int]], seen: int) -> str:
        size = sizes[min(max(seen - 1, 0), len(sizes) - 1)]
        return move_boxes(text, declared=self.declared, size=size, geometry=self.geometry, where=self.where)


def _moved_answer(answer: Answer, mover: _Mover, shared: Sequence[MediaItem], seen: int) -> Answer:
    media = shared if answer.media is None else answer.media
    sizes = [(item.height, item.width) for item in media if item.height]
    if not sizes:
        return answer
    return Answer(mover.content(answer.content, sizes, seen)[0], answer.media)


def _checked(geometry: str | None) -> str:
    if geometry not in GEOMETRIES:
        raise OptionError(
            f"boxes to move, and a processor whose geometry is {geometry!r}",
            expected=f"one of {', '.join(GEOMETRIES)}",
            do="assemble the model with a geometry, or leave `coordinates` out of the source to keep its boxes",
        )
    return geometry
