"""What the rules of all modalities have in common, and how they are written into a configuration."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mllm.errors import OptionError
from mllm.sizes.audio import AudioTokenRule
from mllm.sizes.images import ImageTokenRule
from mllm.sizes.media import MediaSize
from mllm.sizes.video import VideoTokenRule

MediaRule = ImageTokenRule | AudioTokenRule | VideoTokenRule
"""How a tower reads the items of one modality.

An item is read in views: whatever the encoder sees in one piece (an image, a tile, a frame, a window of sound). All
views of a tower have one shape; of a view that was filled up, only the first features count.

- `kind`: the modality: "image", "audio" or "video".
- `connector`: how many vectors the connector makes of so many features.
- `is_joined`: whether the connector reads all views of an item as one sequence, or each view alone.
- `num_dropped`: tokens in front of a view's features that are none.
- `most_views`: how many views an item has at most; None for no limit.
- `views(size)`: how many features of each view of an item count; a RowError where it is too large, or empty.
- `arranged(size, lengths)`: how many tokens connected views of these lengths become, with what is put between them.
"""

RULES: dict[str, Any] = {"image": ImageTokenRule, "audio": AudioTokenRule, "video": VideoTokenRule}


def num_tokens(size: MediaSize, rule: MediaRule) -> int:
    """How many placeholders stand for an item of this size.

    Raises:
        RowError: The item is too large, or has nothing in it.
    """
    return num_vectors(rule.views(size), size, rule)


def num_vectors(views: tuple[int, ...], size: tuple, rule: MediaRule) -> int:
    """How many vectors an item becomes of whose views so many features count."""
    if rule.is_joined:
        return rule.arranged(size, (num_joined_tokens(views, rule),))
    return rule.arranged(size, tuple(rule.connector.count(length) for length in views))


def num_joined_tokens(views: tuple[int, ...], rule: MediaRule) -> int:
    """How many vectors the joined features of an item's views become."""
    return rule.connector.count(sum(views))


def written_rule(rule: MediaRule) -> dict[str, Any]:
    """A rule as a configuration holds it; see `read_rule`."""
    return {"kind": rule.kind, **dataclasses.asdict(rule)}


def read_rule(written: Mapping[str, Any]) -> MediaRule:
    """A rule, from what `written_rule` made of it and JSON left of that.

    Raises:
        OptionError: It was written by another version.
    """
    fields = dict(written)
    try:
        return RULES[fields.pop("kind")].from_fields(fields)
    except (KeyError, TypeError) as error:
        raise OptionError(
            f"a token rule {dict(written)!r:.120} ({error})",
            expected=f"one of kind {', '.join(RULES)}, as this version of mllm writes it",
            do="assemble the model anew, or use the version of mllm that made it",
        ) from error
