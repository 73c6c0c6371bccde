"""Methods whose tokens leave between decoder layers only: where, and how many are left for an average over layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mllm.errors import OptionError
from mllm.pruning.base import Cut, Pruner, Row, Selection
from mllm.pruning.schedules import from_all, lengths_of, per_layer
from mllm.shapes import Float, Tensor


@dataclass
class BetweenLayers(Pruner):
    """All tokens enter the language model; those that leave do so in front of some of its later layers.

    `tokens` is the average over layers. The layers in front of the first cut see everything, so an average that is
    less than they alone make of it is an error.
    """

    def counts(self, num_tokens: int, num_layers: int) -> list[int]:
        """See `Pruner.counts`."""
        return per_layer([num_tokens, *self.left(num_tokens, num_layers)], self._lengths(num_layers))

    def left(self, num_tokens: int, num_layers: int) -> list[int]:
        """How many of an item's tokens are left behind each cut: each time the same share of those before.

        Raises:
            OptionError: The average cannot be met.
        """
        average, lengths = self.budget(num_tokens), self._lengths(num_layers)
        least = lengths[0] * num_tokens + sum(lengths[1:])  # one token in each of the later layers
        if average < num_tokens and average * num_layers < least:
            raise OptionError(
                f"{type(self).__name__}: {average} of {num_tokens} tokens, on average over {num_layers} layers of "
                f"which the first {lengths[0]} see all",
                expected=f"{-(-least // num_layers)} tokens or more",
                do="ask for more tokens, let them leave at an earlier layer, or choose a pruner that works in front "
                "of the language model",
            )
        return from_all(average, lengths, most=num_tokens)

    def leaves_at_cut(self, cut: int, present: tuple[int, ...], entered: tuple[int, ...], num_layers: int) -> bool:
        """See `Pruner.leaves_at_cut`."""
        return any(here > self.left(before, num_layers)[cut] for here, before in zip(present, entered, strict=True))

    def select_at_cut(self, row: Row, cut: int, entered: tuple[int, ...], num_layers: int) -> list[Selection | None]:
        """See `Pruner.select_at_cut`."""
        counts = [self.left(num_tokens, num_layers)[cut] for num_tokens in entered]
        return [
            self.choose(row, number, count) if count < len(row.items[number]) else None
            for number, count in enumerate(counts)
        ]

    def choose(self, row: Row, number: int, count: int) -> Selection:
        """Which tokens of an item stay.

        Args:
            row: In front of the layer that decides.
            number: The item's, among the row's.
            count: How many stay, fewer than there are.
        """
        raise NotImplementedError

    def cuts_at(self, layers: Sequence[int], num_layers: int, *, scored: int) -> tuple[Cut, ...]:
        """The cuts in front of these layers.

        Args:
            layers: Ascending, from 1.
            num_layers: Of the language model.
            scored: How many layers before the cut it is decided; 0 for the layer behind the cut itself.

        Raises:
            OptionError: The language model has no such layers.
        """
        is_fine = layers and layers[0] >= 1 and layers[-1] < num_layers and list(layers) == sorted(set(layers))
        if not is_fine:
            raise OptionError(
                f"{type(self).__name__}: cuts in front of the layers {list(layers)}, of {num_layers} in the model",
                expected=f"ascending layers from 1 to {num_layers - 1}" if num_layers > 1 else "two layers or more",
                do="name other layers, or choose a pruner that works in front of the language model",
            )
        return tuple(Cut(layer, layer - scored) for layer in layers)

    def _lengths(self, num_layers: int) -> list[int]:
        """How many layers stand in front of the first cut, and behind each."""
        return lengths_of([0, *(cut.layer for cut in self.cuts(num_layers))], num_layers)


def paid_by_last(row: Row) -> Float[Tensor, " M"]:
    """What the last token of a row pays to each of its tokens, as a mean over heads."""
    last = torch.tensor([len(row.hidden) - 1], device=row.hidden.device)
    return row.attention(last).mean(dim=0)[0]
