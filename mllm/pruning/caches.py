"""What a cache holds that was filled under a pruner: layers with different numbers of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from transformers import Cache
from transformers.cache_utils import DynamicLayer

from mllm.errors import OptionError
from mllm.shapes import Bool, Tensor


@dataclass(frozen=True)
class Reached:
    """Where a cache stands after a forward.

    Args:
        past: Of each stage, which of the slots in its layers' cache hold tokens [B, P]; and one of those layers.
        gap: How many columns of the prompts are in no slot of the first layer.
    """

    past: tuple[tuple[int, Bool[Tensor, "B P"]], ...]
    gap: int


class CacheBook:
    """The caches that a pruner has seen."""

    def __init__(self):
        self._reached: WeakKeyDictionary[Cache, Reached] = WeakKeyDictionary()

    def stages_of(self, cache: Cache | None) -> Reached | None:
        """What is known of a cache; None of a new one, or one that no pruned prompt has filled.

        Tokens that were taken back from its end (`crop`) are taken back here, too.

        Raises:
            OptionError: It is of a kind whose layers all have one length.
        """
        if cache is None:
            return None
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            kinds = sorted({type(layer).__name__ for layer in cache.layers})
            raise OptionError(
                f"a {type(cache).__name__} of {', '.join(kinds)}, under a pruner",
                expected="a DynamicCache of full attention, whose layers may hold different numbers of tokens",
                do="generate without `cache_implementation`, or without a pruner",
            )
        known = self._reached.get(cache)
        if known is None or cache.get_seq_length(layer_idx=0) == 0:
            return None
        past = tuple((layer, mask[:, : cache.get_seq_length(layer_idx=layer)]) for layer, mask in known.past)
        return Reached(past, known.gap)

    def keep(self, cache: Cache, reached: Reached) -> None:
        """Remember where a cache stands, and let it tell its length in tokens of the prompts.

        `generate` asks a cache for its length to find out what of a prompt is new. Asked for that of a layer, as masks
        do, it answers as before.
        """
        if reached.gap and "get_seq_length" not in vars(cache):
            cache.get_seq_length = partial(_length, cache.get_seq_length, lambda: self._reached[cache].gap)
        self._reached[cache] = reached


def _length(own: Callable[..., int], gap: Callable[[], int], layer_idx: int | None = None) -> Any:
    return own() + gap() if layer_idx is None else own(layer_idx=layer_idx)
