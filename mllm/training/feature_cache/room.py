"""What a fill will take of the disk, told before anything is written."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mllm.errors import OptionError
from mllm.training.feature_cache.key import FeatureSpace
from mllm.training.feature_cache.store import RECORD


class Missing(NamedTuple):
    """What a cache does not hold of one kind of media.

    Args:
        space: Theirs.
        num_media: How many have views that are not there.
        num_views: How many views are not.
    """

    space: FeatureSpace
    num_media: int
    num_views: int


@dataclass(frozen=True)
class Estimate:
    """What a fill will take.

    Args:
        num_media: Media of the run, each file counted once.
        num_missing: Those of different content that the cache does not hold, or not all of.
        num_bytes: What they will take on the disk.
        free_bytes: What is free there.
    """

    num_media: int
    num_missing: int
    num_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        done = f"{self.num_media:,} media, {self.num_missing:,} of them to be encoded"
        return f"{done}: {in_units(self.num_bytes)} of {in_units(self.free_bytes)} free"


def estimate_fill(directory: Path, missing: Sequence[Missing], *, num_media: int) -> Estimate:
    """How much will be written, and how much can be."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    num_bytes = sum(one.num_views * (one.space.view_bytes + RECORD.itemsize) for one in missing)
    num_missing = sum(one.num_media for one in missing)
    return Estimate(num_media, num_missing, num_bytes, shutil.disk_usage(there).free)


def check_room(directory: Path, estimate: Estimate) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        OptionError: The disk has no room.
    """
    if estimate.num_bytes > estimate.free_bytes:
        raise OptionError(
            f"feature_cache: {directory} has {in_units(estimate.free_bytes)} free, and the features of "
            f"{estimate.num_missing:,} media take {in_units(estimate.num_bytes)}",
            expected="room for the features of all media of the run",
            do="name a directory on a larger disk, take fewer rows, or leave `feature_cache` out",
        )


def in_units(num_bytes: int) -> str:
    """Bytes as people read them."""
    size, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
