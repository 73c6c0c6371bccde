"""What the better answer of a preference is contrasted with: other media under which it is worse.

Re-Align takes a retrieved image, which the row brings; mDPO a small random crop of the row's own; V-DPO a blank one.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import numpy as np
from PIL import Image

from mllm.data.schema import MediaItem, PreferenceRow
from mllm.errors import RowError

CHOSEN, REJECTED, CONTRAST = "chosen", "rejected", "contrast"
"""The sides of a pair, by name; the first two also begin the names of sides that are read under blank media."""
UNSEEN = "_unseen"
"""Ends those."""
NONE, RETRIEVED, CROP, BLANK = "none", "retrieved", "crop", "blank"
CONTRASTS = (NONE, RETRIEVED, CROP, BLANK)
ASPECTS = (3 / 4, 4 / 3)
"""Width to height of a random crop, as torchvision's `RandomResizedCrop` has it."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """Which sides a pair has beside its two answers.

    Args:
        media: What the better answer is read under once more: one of `CONTRASTS`.
        crop_scale: Of "crop": the least and the largest share of the picture's area. mDPO: (0.01, 0.2).
        seed: Of the crops. A row's crop is the same in every epoch, so that its reference can be computed beforehand.
        is_unseen_needed: Whether both answers are also read under blank media, as V-DPO's guidance asks.
    """

    media: str = NONE
    crop_scale: tuple[float, float] = (0.01, 0.2)
    seed: int = 0
    is_unseen_needed: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """A medium as a side shows it.

    Args:
        item: The medium.
        change: "" for as it is, "crop" or "blank".
        key: What a crop is drawn by.
    """

    item: MediaItem
    change: str = ""
    key: str = ""


def shown_by(row: PreferenceRow, side: str, contrast: Contrast) -> tuple[Shown, ...]:
    """The media of a side, by its name.

    Raises:
        RowError: The row lacks the retrieved image, it is the row's own, or there is nothing to contrast.
    """
    if side.endswith(UNSEEN):
        return _changed(_own(row, side), BLANK, "")
    if side != CONTRAST:
        return tuple(Shown(item) for item in _own(row, side))
    if contrast.media == RETRIEVED:
        return tuple(Shown(item) for item in _retrieved(row))
    changed = _changed(_own(row, CHOSEN), contrast.media, f"{contrast.seed}/{row.source}/{row.id}")
    if not any(one.change for one in changed):
        raise RowError(
            f"{row.name}: no image to contrast the chosen answer with",
            expected=f"a row with an image: contrast = {contrast.media}",
            do="drop the row, or train without a visual preference (preset: dpo)",
        )
    return changed


def changed_data(data: Any, shown: Shown, crop_scale: tuple[float, float]) -> Any:
    """A decoded medium as its side shows it, of the size of the original.

    Args:
        data: An image, the samples of a sound, or the frames of a video.
        shown: What is to be done to it. Only images are cropped.
        crop_scale: See `Contrast`.
    """
    if shown.change == CROP:
        return random_crop(data, random.Random(shown.key), crop_scale)
    if shown.change == BLANK:
        if isinstance(data, np.ndarray):
            return np.zeros_like(data)
        return [_blank(frame) for frame in data] if isinstance(data, list) else _blank(data)
    return data


def random_crop(image: Image.Image, rng: random.Random, scale: Sequence[float]) -> Image.Image:
    """A random part of a picture, resized to all of it.

    Source: torchvision's `RandomResizedCrop`: area uniform in `scale`, aspect log-uniform in `ASPECTS`. Where such a
    part does not fit into a long picture, torchvision draws again; here it is cut to what fits.
    """
    width, height = image.size
    area = width * height * rng.uniform(*scale)
    aspect = exp(rng.uniform(log(ASPECTS[0]), log(ASPECTS[1])))
    part = (min(width, max(1, round((area * aspect) ** 0.5))), min(height, max(1, round((area / aspect) ** 0.5))))
    left, top = rng.randint(0, width - part[0]), rng.randint(0, height - part[1])
    box = (left, top, left + part[0], top + part[1])
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _own(row: PreferenceRow, side: str) -> tuple[MediaItem, ...]:
    own = (row.rejected if side.startswith(REJECTED) else row.chosen).media
    return row.media if own is None else own


def _retrieved(row: PreferenceRow) -> tuple[MediaItem, ...]:
    if not row.contrast:
        raise RowError(
            f"{row.name}: no retrieved image (`contrast`)",
            expected="media under which the chosen answer is dispreferred",
            do="drop the row, or train without a visual preference (preset: dpo)",
        )
    if row.contrast == _own(row, CHOSEN):
        raise RowError(
            f"{row.name}: the retrieved image is the row's own",
            expected="another one: under the same image the answer cannot be worse",
            do="drop the row, or retrieve again",
        )
    return row.contrast


def _changed(items: Sequence[MediaItem], change: str, key: str) -> tuple[Shown, ...]:
    """Images (and, made blank, all media) changed, the rest as it is. Each of a row has a key of its own."""
    return tuple(
        Shown(item, change, f"{key}/{place}" if key else "")
        if item.kind == "image" or change == BLANK
        else Shown(item)
        for place, item in enumerate(items)
    )


def _blank(image: Image.Image) -> Image.Image:
    """A picture of the mean colour: with as much light, and nothing to be seen."""
    mean = np.asarray(image, np.float32).reshape(-1, 3).mean(0).round().astype(int)
    return Image.new("RGB", image.size, tuple(mean.tolist()))
