"""What a pruner is: which visual tokens of a prompt it keeps, in front of the language model and between its layers.

A method decides, and nothing else: it is asked once for each picture or video in front of the language model
(`select`), and once for each row at each of its cuts (`select_at_cut`). What follows from its decisions for hidden
states, masks, positions and caches is the same for all methods, and stands in `mllm.pruning.attach` and
`mllm.pruning.prefill`.
"""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mllm.errors import OptionError
from mllm.pruning.anatomy import Anatomy
from mllm.pruning.evidence import Evidence
from mllm.pruning.statistics import Statistics
from mllm.shapes import Bool, Float, Int, MediaVectors, Tensor

POSITIONS = ("original", "compacted")


@dataclass(frozen=True)
class Selection:
    """Which tokens of a media item stay.

    Args:
        kept: Their places among the item's tokens at hand, in the order in which they stand from now on.
        values: What they become [kept, D]; None where each stays as it is.
        merged_into: Of each token at hand, which of `kept` it lives on in; -1 for none. None where nothing is merged.
    """

    kept: Int[Tensor, " n"]
    values: Float[Tensor, "n D"] | None = None
    merged_into: Int[Tensor, " V"] | None = None


@dataclass(frozen=True)
class Item:
    """A picture or a video in front of the language model.

    Args:
        kind: "image" or "video".
        vectors: What the connector made of it [V, D].
        evidence: What its encoder tells of its patches, for pruners with `encoder_layers`.
        grid: Views (or frames), rows and columns of its vectors, where they stand in grids and nothing else is among
            them.
        unread: Why no encoder can tell anything of its patches; None where one could.
    """

    kind: str
    vectors: MediaVectors
    evidence: Evidence | None
    grid: tuple[int, int, int] | None
    unread: str | None = None


@dataclass(frozen=True)
class Embedded:
    """The tokens of a row as they entered the language model.

    Args:
        vectors: In front of its first layer [E, D].
        items: Which of them are those of each visual item.
    """

    vectors: Float[Tensor, "E D"]
    items: tuple[Int[Tensor, " _"], ...]


@dataclass(frozen=True)
class Row:
    """A row of a batch in front of a decoder layer, without its padding.

    Args:
        hidden: Hidden states of its tokens [M, D].
        items: Which of its tokens are those of each visual item.
        queries: Of this layer, rotated [H, M, d].
        keys: Of this layer, rotated, a head for each of the queries' [H, U, d]: first those of tokens that a cache
            holds from earlier turns.
        scaling: What scores are multiplied by.
        embedded: The row as it entered the language model; text tokens are still all there.
    """

    hidden: Float[Tensor, "M D"]
    items: tuple[Int[Tensor, " _"], ...]
    queries: Float[Tensor, "H M d"]
    keys: Float[Tensor, "H U d"]
    scaling: float
    embedded: Embedded | None = None

    @property
    def is_visual(self) -> Bool[Tensor, " M"]:
        """Which tokens are visual."""
        found = torch.zeros(len(self.hidden), dtype=torch.bool, device=self.hidden.device)
        for item in self.items:
            found[item] = True
        return found

    def attention(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "H n M"]:
        """What these tokens pay to all tokens of the row: causal, softmax over all keys in float32.

        Keys from earlier turns take their share, and are left out of what is returned.
        """
        num_past = self.keys.shape[1] - self.queries.shape[1]
        scores = (self.queries[:, tokens] @ self.keys.transpose(1, 2)).float() * self.scaling
        places = torch.arange(self.keys.shape[1], device=tokens.device)
        scores = scores.masked_fill(places > tokens[:, None] + num_past, float("-inf"))
        return scores.softmax(dim=-1)[..., num_past:]


@dataclass(frozen=True)
class Cut:
    """A place between decoder layers where tokens leave.

    Args:
        layer: They leave in front of this one, counted from 0.
        scored_at: The layer whose queries and keys decide: this one, or the one before, as FastV reads it.
    """

    layer: int
    scored_at: int


@dataclass
class Pruner:
    """What all methods share; each is a dataclass of its own options.

    A pruner is called on a model and entered: inside, the model generates from fewer visual tokens; afterwards it is
    as it was, also after an exception.

    Example:
        with VisionDrop(tokens=64)(model):
            model.generate(**inputs)

    Args:
        tokens: How many visual tokens of each picture or video the language model sees: a number, or a share of the
            item's own below 1. Methods that cut between layers mean the average over layers. An item that has no more
            keeps all.
        positions: "original": tokens keep the positions they had in the whole prompt, as if the others were there.
            "compacted": they are counted anew without gaps, in every layer.
    """

    tokens: int | float = 64
    positions: str = "original"
    statistics: Statistics = field(default_factory=Statistics, init=False, repr=False, compare=False)

    encoder_layers: ClassVar[tuple[int, ...]] = ()
    """Of which of the encoder's layers `select` reads queries and keys: 0 is the first, -1 the one whose output the
    connector reads."""
    reads_text: ClassVar[bool] = False
    """Whether what stays of a picture may depend on the text behind it."""

    def __post_init__(self):
        is_share = isinstance(self.tokens, float)
        self.check("tokens", 0 < self.tokens < 1 if is_share else self.tokens >= 1, "1 or more, or a share below 1")
        self.check("positions", self.positions in POSITIONS, f"one of {', '.join(POSITIONS)}")

    def check(self, name: str, is_fine: bool, expected: str) -> None:
        """Refuse an option's value.

        Raises:
            OptionError: It is not fine.
        """
        if not is_fine:
            found = f"{type(self).__name__}: {name} = {getattr(self, name)!r}"
            raise OptionError(found, expected=expected, do=f"correct `{name}`")

    def __call__(self, model: PreTrainedModel | PeftModel) -> AbstractContextManager["Pruner"]:
        """A context in which `model` is pruned.

        Raises:
            OptionError: The model lacks what the method needs, or a pruner is attached to it already.
        """
        from mllm.pruning.attach import attached  # which knows this class

        return attached(model, self)

    def take_hold(self, anatomy: Anatomy, stack: ExitStack) -> None:
        """Put what only this method needs on a model, such as hooks inside of its encoder; the stack takes it off.

        Raises:
            OptionError: The model lacks what the method needs.
        """

    def budget(self, num_tokens: int) -> int:
        """How many of an item's tokens `tokens` means, from 1 to all of them."""
        wanted = round(self.tokens * num_tokens) if isinstance(self.tokens, float) else self.tokens
        return min(max(wanted, 1), num_tokens)

    def cuts(self, num_layers: int) -> tuple[Cut, ...]:
        """Where in a language model of so many layers tokens leave, in order.

        Raises:
            OptionError: The options name a layer that it does not have.
        """
        return ()

    def counts(self, num_tokens: int, num_layers: int) -> list[int]:
        """How many tokens of an item of `num_tokens` each layer sees, whatever is in it."""
        return [self.budget(num_tokens)] * num_layers

    def select(self, item: Item, num_layers: int) -> Selection | None:
        """Which vectors of an item enter a language model of so many layers; None for all."""
        return None

    def leaves_at_cut(self, cut: int, present: tuple[int, ...], entered: tuple[int, ...], num_layers: int) -> bool:
        """Whether any token of a row leaves at a cut; if of no row, scores are not read there, and nobody is asked.

        Args:
            cut: Its number among `cuts`.
            present: How many tokens of each item are there.
            entered: How many each had in the first place.
            num_layers: Of the language model.
        """
        return True

    def select_at_cut(self, row: Row, cut: int, entered: tuple[int, ...], num_layers: int) -> list[Selection | None]:
        """Which tokens of each of a row's items stay at a cut.

        Args:
            row: In front of the layer that decides.
            cut: Its number among `cuts`.
            entered: How many tokens each item had in the first place, from which its budget follows.
            num_layers: Of the language model.
        """
        raise NotImplementedError


def top(scores: Float[Tensor, " V"], count: int) -> Int[Tensor, " n"]:
    """The places of the highest scores, in ascending order of places; of equal scores the first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values
