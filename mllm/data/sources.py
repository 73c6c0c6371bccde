"""One entry of `data:`: which file, in which form, with which media, and how much of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mllm.errors import OptionError

ON_BAD = ("error", "quarantine")


@dataclass(frozen=True)
class Source:
    """One entry of `data:`, options already checked and paths already absolute or relative to the working directory.

    Args:
        path: A file, a directory, or a Hub id such as "hub://ORG/NAME".
        format: Name of an importer (`mllm.data.importers.IMPORTERS`); "" to find it out from the first records.
        name: What rows of this source are called where they do not say themselves; the file's stem by default.
        media_root: What relative media paths are relative to; the file's directory by default.
        remap: Replacements of path prefixes, tried longest first, before `media_root` applies.
        columns: Names of columns by what they hold, for sources whose columns are not documented.
        options: Of the importer, such as `min_margin` of VLFeedback.
        subset: Configuration of a Hub data set, or entry of a `dataset_info.json`.
        split: Split of a Hub data set.
        revision: Revision of a Hub data set.
        coordinates: How boxes in the texts are written (`mllm.data.schema.COORDINATES`); "" if there are none.
        licence: Licence of the data, for the record of a run.
        take: "all", "first:N", "end:N", "random:N"; N a number of rows, or a percentage such as 10%.
        weight: Share of this source in an epoch, relative to the weights of the others; None for all its rows once.
        on_bad: What becomes of bad rows and media: "error" (after all have been listed) or "quarantine".
        max_bad_rate: Share of bad rows above which the quarantine, too, is an error.
    """

    path: str | Path
    format: str = ""
    name: str = ""
    media_root: Path | None = None
    remap: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    subset: str = ""
    split: str = ""
    revision: str = ""
    coordinates: str = ""
    licence: str = ""
    take: str = "all"
    weight: float | None = None
    on_bad: str = "error"
    max_bad_rate: float = 0.05

    def __post_init__(self):
        if self.on_bad not in ON_BAD:
            raise OptionError(f"on_bad = {self.on_bad!r}", expected=f"one of {', '.join(ON_BAD)}", do="choose one")
        if not 0 <= self.max_bad_rate <= 1:
            raise OptionError(f"max_bad_rate = {self.max_bad_rate}", expected="a share from 0 to 1", do="correct it")
