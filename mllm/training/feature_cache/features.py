"""Features in place of media, for the batches of a run."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mllm.data.examples import Example
from mllm.data.schema import MediaItem
from mllm.errors import MediaError, MllmError
from mllm.shapes import Float, Tensor
from mllm.training.feature_cache.fill import Problems
from mllm.training.feature_cache.media import RunMedia, address_of
from mllm.training.feature_cache.store import FeatureStore


class CachedFeatures:
    """The features of every medium of a run, by the rows that show them. A collator uses it in place of a decoder.

    Args:
        store: Where they lie.
        media: The run's.
        places: For each item the numbers of its shard and of its place there; -1 for one that could not be decoded.
        problems: What is wrong with those.
    """

    def __init__(self, store: FeatureStore, media: RunMedia, places: np.ndarray, problems: Problems):
        store.forget_keys()
        self.store = store
        self.numbers, self.starts = media.numbers, media.starts
        self.addresses = np.fromiter(map(_address_sum, media.items), np.uint32, len(media.items))
        """By which a row of other data is told, whose number means another row here."""
        self.places = places
        self.problems = problems

    def of(self, example: Example) -> Iterator[Float[Tensor, "P D_encoder"]]:
        """The features of a row's media, as they are asked for.

        Raises:
            MediaError: The medium could not be decoded when the cache was filled.
            CheckpointError: A file of the cache is damaged.
        """
        start = int(self.starts[example.position])
        numbers = self.numbers[start : start + len(example.row.media)].tolist()
        for item, number in zip(example.row.media, numbers, strict=True):
            assert self.addresses[number] == _address_sum(item), f"{example.row.name} is no row of this run"
            shard, place = self.places[number].tolist()
            if shard < 0:
                raise of_row(self.problems[number], example.row.name)
            features = torch.empty(self.store.space.num_tokens, self.store.space.width, dtype=self.store.space.dtype)
            self.store.read((shard, place), features)
            yield features

    def stack(self, features: Sequence[Float[Tensor, "P D_encoder"]]) -> Float[Tensor, "N P D_encoder"]:
        """A batch of features, which may be none."""
        if features:
            return torch.stack(list(features))
        return torch.empty(0, self.store.space.num_tokens, self.store.space.width, dtype=self.store.space.dtype)


def of_row(error: MllmError, name: str) -> MediaError:
    """A medium's problem as one of the row of this name."""
    return MediaError(f"{name}: {error.found}", expected=error.expected, do=error.do)


def _address_sum(item: MediaItem) -> int:
    return zlib.crc32(address_of(item).encode("utf-8", "surrogatepass"))
