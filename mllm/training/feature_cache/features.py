"""Features in place of media, for the batches of a run."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mllm.data.schema import MediaItem
from mllm.errors import MediaError, MllmError
from mllm.shapes import EncoderFeatures, Tensor
from mllm.sizes import MediaRule, MediaSize
from mllm.training.feature_cache.fill import Problems
from mllm.training.feature_cache.media import RunMedia, address_of
from mllm.training.feature_cache.sizes import size_inputs
from mllm.training.feature_cache.store import FeatureStore


@dataclass(frozen=True)
class Places:
    """Where the features of a run's media lie.

    Args:
        views: Of each view the numbers of its shard and of its place there.
        starts: For each item where its views begin, and behind the last where they end. An item without views could
            not be decoded.
        problems: What is wrong with those.
    """

    views: np.ndarray
    starts: np.ndarray
    problems: Problems

    def of(self, number: int) -> np.ndarray:
        """The places of an item's views."""
        return self.views[self.starts[number] : self.starts[number + 1]]


class CachedMedium(NamedTuple):
    """A medium as a batch needs it.

    Args:
        kind: "image", "audio" or "video".
        features: Of all its views.
        size: Its own, from which follows how they are laid out.
    """

    kind: str
    features: EncoderFeatures
    size: MediaSize


class CachedFeatures:
    """The features of every medium of a run, by the rows that show them. A collator uses it in place of a decoder.

    Args:
        stores: Where they lie, by kind.
        rules: How many views a medium has, by kind.
        media: The run's.
        places: Theirs.
    """

    def __init__(
        self, stores: Mapping[str, FeatureStore], rules: Mapping[str, MediaRule], media: RunMedia, places: Places
    ):
        for store in stores.values():
            store.forget_keys()
        self.stores = dict(stores)
        self.rules = dict(rules)
        self.numbers, self.starts = media.numbers, media.starts
        self.addresses = np.fromiter(map(_address_sum, media.items), np.uint32, len(media.items))
        """By which a row of other data is told, whose number means another row here."""
        self.places = places

    def of(self, example: Any) -> Iterator[CachedMedium]:
        """A row's media, as they are asked for.

        Raises:
            MediaError: The medium could not be decoded when the cache was filled.
            CheckpointError: A file of the cache is damaged.
        """
        start = int(self.starts[example.position])
        numbers = self.numbers[start : start + len(example.media_items)].tolist()
        for item, number in zip(example.media_items, numbers, strict=True):
            assert self.addresses[number] == _address_sum(item), f"{example.row.name} is no row of this run"
            if number in self.places.problems:
                raise of_row(self.places.problems[number], example.row.name)
            places = self.places.of(number)
            features = self._empty(item.kind, len(places))
            for place, into in zip(places.tolist(), features, strict=True):
                self.stores[item.kind].read(tuple(place), into)
            yield CachedMedium(item.kind, features, item.size)

    def batch(self, media: Sequence[CachedMedium]) -> dict[str, Tensor]:
        """A batch's inputs: for every kind that the model reads its features, of which there may be none."""
        inputs = size_inputs([one.size for one in media], self.rules)
        for kind in self.stores:
            own = [one.features for one in media if one.kind == kind]
            inputs[f"{kind}_features"] = torch.cat(own) if own else self._empty(kind, 0)
        return inputs

    def _empty(self, kind: str, num_views: int) -> EncoderFeatures:
        space = self.stores[kind].space
        return torch.empty(num_views, space.num_tokens, space.width, dtype=space.dtype)


def of_row(error: MllmError, name: str) -> MediaError:
    """A medium's problem as one of the row of this name."""
    return MediaError(f"{name}: {error.found}", expected=error.expected, do=error.do)


def _address_sum(item: MediaItem) -> int:
    return zlib.crc32(address_of(item).encode("utf-8", "surrogatepass"))
