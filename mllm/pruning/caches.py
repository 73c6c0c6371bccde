"""A cache that was filled under a pruner: its layers hold different numbers of tokens, and it knows which."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from mllm.errors import OptionError, RowError
from mllm.shapes import Bool, Tensor


@dataclass(frozen=True)
class Reached:
    """Where a cache stands after a forward.

    Args:
        layers: In front of which layers stages begin; the first is 0.
        past: Of each stage, which of the slots in its layers' cache hold tokens [B, P].
        gap: How many columns of the prompts are in no slot of the first layer.
        tail: How many columns at the end are in all layers of all rows.
        positions: How the pruner counted them.
    """

    layers: tuple[int, ...]
    past: tuple[Bool[Tensor, "B _"], ...]
    gap: int
    tail: int
    positions: str

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Reached":
        """After something was done to the rows or the slots of all layers."""
        return replace(self, past=tuple(change(mask) for mask in self.past))


class PrunedCache(DynamicCache):
    """What a `DynamicCache` becomes: of this class, with what else there was in it.

    It tells its length in tokens of the prompts, by which `generate` finds out what of a prompt is new; asked for that
    of a layer, as masks do, what the layer holds. Rows may be repeated, selected and copied, and tokens taken back
    from its end. Only the pruner that filled it, or one that cuts at the same layers, can go on with it.
    """

    reached: Reached
    is_open: bool
    """Whether a forward under such a pruner is at work."""

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """How many tokens it was shown, or how many a layer holds."""
        if layer_idx is None:
            return super().get_seq_length() + self.reached.gap
        return super().get_seq_length(layer_idx)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take up keys and values of a layer.

        Raises:
            OptionError: No pruner is at work, without which masks do not fit the layers.
        """
        if not self.is_open:
            raise OptionError(
                "a cache that was filled under a pruner, in a forward without it",
                expected="a forward in the pruner's context",
                do="go on in the block of the pruner, or begin with a new cache",
            )
        return super().update(*args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back from the end.

        Args:
            tokens_to_remove: As a negative number; a positive one is the length to be left, in tokens of the prompts.

        Raises:
            RowError: So many that pictures would be reached, of which each layer holds other tokens.
        """
        wanted = -tokens_to_remove if tokens_to_remove <= 0 else self.get_seq_length() - tokens_to_remove
        if wanted <= 0:
            return
        if wanted > self.reached.tail:
            raise RowError(
                f"a cache to be cropped by {wanted} tokens, filled under a pruner",
                expected=f"at most {self.reached.tail}, the tokens behind the last picture or video",
                do="begin with a new cache",
            )
        super().crop(-wanted)
        shorter = self.reached.changed(lambda mask: mask[:, : mask.shape[1] - wanted])
        self.reached = replace(shorter, tail=self.reached.tail - wanted)

    def reset(self) -> None:
        """Forget everything, also that a pruner filled it."""
        super().reset()
        self.__class__ = DynamicCache
        del self.reached, self.is_open

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows in another order."""
        super().reorder_cache(beam_idx)
        self.reached = self.reached.changed(lambda mask: mask[beam_idx.to(mask.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self.reached = self.reached.changed(lambda mask: mask.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.reached = self.reached.changed(lambda mask: mask[indices.to(mask.device)])


def reached_by(cache: Cache | None, *, layers: tuple[int, ...], positions: str) -> Reached | None:
    """Where a cache stands; None for one that no pruned prompt has filled.

    Args:
        cache: Of a forward.
        layers: In front of which layers the stages of the pruner at work begin.
        positions: How it counts them.

    Raises:
        OptionError: Another kind of pruner has filled it.
    """
    if not isinstance(cache, PrunedCache):
        return None
    found = cache.reached
    if (found.layers, found.positions) != (layers, positions):
        raise OptionError(
            f"a cache filled by a pruner that cuts at layers {found.layers[1:]}, positions {found.positions}",
            expected=f"one filled by the pruner at work: layers {layers[1:]}, positions {positions}",
            do="go on with the pruner that filled it, or begin with a new cache",
        )
    return found


def check_kind(cache: Cache | None) -> None:
    """Refuse what cannot hold different numbers of tokens in its layers.

    Raises:
        OptionError: It is no `DynamicCache` of full attention.
    """
    if cache is None:
        return
    if type(cache) in (DynamicCache, PrunedCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
        return
    kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
    raise OptionError(
        f"a {type(cache).__name__} of {kinds}, under a pruner",
        expected="a DynamicCache of full attention, whose layers may hold different numbers of tokens",
        do="generate without `cache_implementation`, or without a pruner",
    )


def remember(cache: DynamicCache, reached: Reached) -> None:
    """Let a cache know where it stands."""
    cache.__class__ = PrunedCache
    assert isinstance(cache, PrunedCache)
    cache.reached, cache.is_open = reached, False


def open_cache(cache: Cache | None) -> None:
    """Let a forward that knows of the pruner fill it; `remember` closes it."""
    if isinstance(cache, PrunedCache):
        cache.is_open = True


def all_tokens(cache: Cache | None, like: Tensor) -> Bool[Tensor, "B P"]:
    """Which slots of the first layer hold tokens, of a cache that was filled without a pruner and without padding."""
    length = 0 if cache is None else int(cache.get_seq_length())
    return torch.ones(len(like), length, dtype=torch.bool, device=like.device)
