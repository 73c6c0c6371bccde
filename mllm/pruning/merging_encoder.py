"""An encoder whose tokens become fewer from layer to layer, those that leave having gone into others (CrossGET)."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mllm.errors import OptionError
from mllm.pruning.encoder_blocks import Block, attended, fed_forward
from mllm.pruning.soft_matching import ensemble, match_tokens
from mllm.shapes import Bool, Float, Int, Tensor

IMPORTANCES = ("attention", "cosine", "none")


@dataclass(frozen=True)
class Slots:
    """The tokens of an encoder as one of its layers sees them, in their order.

    Args:
        columns: Which of the encoder's own T tokens each slot holds; T where it holds the cross token.
        is_token: False for slots that hold nothing.
        sizes: For how many tokens each stands; None while each stands for itself.
        lives_in: Of each of the encoder's own tokens, in which of them it lives on.
    """

    columns: Int[Tensor, "B t"]
    is_token: Bool[Tensor, "B t"]
    sizes: Float[Tensor, "B t"] | None
    lives_in: Int[Tensor, "B T"]

    def at(self, column: int | Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The slot in which a token stands, in each row."""
        wanted = column[:, None] if isinstance(column, Tensor) else column
        return ((self.columns == wanted) & self.is_token).int().argmax(dim=1)


@dataclass(frozen=True)
class MergeOptions:
    """How an encoder's tokens are merged.

    Args:
        steps: How many of so many candidates leave in each layer.
        importance: "attention": what a token is paid by all, and once more by the guide; "cosine": how like its key is
            to the guide's query (where there is no guide: to the mean of all queries); "none": all are alike.
        proportional: Whether a merged token is attended to as so many as it stands for.
    """

    steps: Callable[[int], list[int]]
    importance: str
    proportional: bool


class MergingEncoder:
    """Gives the layers of a vision encoder a forward in which tokens merge between attention and MLP.

    Args:
        layers: Those that merge, from the first.
        block: What they consist of.
        num_heads: Of their attention.
        num_prefix_tokens: Tokens in front of the patches. They never merge; the first, the class token, is the guide
            where there are no cross tokens.
        options: How.
        cross_tokens: Of each layer what is added to a token of its own that carries the class token along (without a
            class token the mean of the patches), and is the guide; None for no such token.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        block: Block,
        *,
        num_heads: int,
        num_prefix_tokens: int,
        options: MergeOptions,
        cross_tokens: Float[Tensor, "layers D"] | None = None,
    ):
        self.layers = layers
        self.block = block
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.options = options
        self.cross_tokens = cross_tokens
        self.num_tokens = 0
        """Of the encoder itself, in the forward at hand."""
        self.steps: list[list[int]] = []
        self.slots: list[Slots] = []
        """In front of each layer, and behind the last; kept for the backward, which may run layers again."""
        self.carried: list[Tensor] = []
        """The cross token in front of each layer of the last forward [B, D]: what an alignment loss compares."""
        self.read: dict[str, Tensor] = {}

    def take_hold(self, stack: ExitStack) -> None:
        """Put the forward on the layers, and its removal on the stack.

        Raises:
            OptionError: Somebody else has put one there, or their attention cannot count merged tokens as several.
        """
        for number, layer in enumerate(self.layers):
            if "forward" in vars(layer):
                raise OptionError(
                    f"a {type(layer).__name__} with a forward of its own (layers spread over devices have one)",
                    expected="layers as transformers makes them",
                    do="load the encoder on one device, or choose a pruner that leaves it alone (visiondrop, uniform)",
                )
            attention = layer.get_submodule(self.block.attention)
            self._check_attention(attention.config._attn_implementation)
            layer.forward = partial(self._forward, number, layer)
            stack.callback(delattr, layer, "forward")
            for name in ("q_proj", "k_proj"):
                hook = partial(self._note, name)
                stack.callback(attention.get_submodule(name).register_forward_hook(hook).remove)

    @property
    def last(self) -> Slots:
        """Which tokens are left behind the last layer that merges."""
        return self.slots[len(self.layers)]

    def begin(self, hidden: Float[Tensor, "B T D"]) -> Slots:
        """The tokens in front of the first layer, of which all patches are candidates."""
        columns = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        steps = self.options.steps(hidden.shape[1] - self.num_prefix_tokens)
        self.steps = [[step] * len(hidden) for step in steps]
        return Slots(columns, torch.ones_like(columns, dtype=torch.bool), None, columns)

    def carrier(self, hidden: Float[Tensor, "B t D"], slots: Slots) -> Float[Tensor, "B D"]:
        """What the cross token begins with."""
        return hidden[:, 0] if self.num_prefix_tokens else hidden.mean(dim=1)

    def guide(self, slots: Slots) -> Int[Tensor, " B"] | None:
        """The slot whose query says what is important."""
        if self.cross_tokens is not None:
            return slots.at(self.num_tokens)
        return slots.at(0) if self.num_prefix_tokens else None

    def is_candidate(self, slots: Slots) -> Bool[Tensor, "B t"]:
        """Which slots may merge."""
        is_patch = (slots.columns >= self.num_prefix_tokens) & (slots.columns < self.num_tokens)
        return is_patch & slots.is_token

    def mask(self, slots: Slots, given: Tensor | None, hidden: Float[Tensor, "B t D"]) -> Tensor | None:
        """The mask of a layer's attention: nothing but by how much merged tokens count."""
        if slots.sizes is None or not self.options.proportional:
            return given if hidden.shape[1] == self.num_tokens else None
        return slots.sizes.log().to(hidden.dtype)[:, None, None]

    def _forward(
        self,
        number: int,
        layer: nn.Module,
        hidden_states: Float[Tensor, "B t D"],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "B _ D"]:
        hidden = hidden_states
        if number == 0:
            self.num_tokens, self.carried = hidden.shape[1], []
            self.slots = [self.begin(hidden)]
            if self.cross_tokens is not None:
                hidden = torch.cat([hidden, self.carrier(hidden, self.slots[0])[:, None]], dim=1)
                self.slots[0] = _with_cross_slot(self.slots[0], self.num_tokens)
        slots = self.slots[number]
        if self.cross_tokens is not None:
            hidden = self._with_cross_token(number, hidden, slots)
        mask = self.mask(slots, attention_mask, hidden)
        hidden = attended(layer, self.block, hidden, mask, kwargs)
        if any(self.steps[number]):
            hidden, slots = self._merged(number, hidden, slots, mask)
        self.slots[number + 1 :] = [slots]
        return fed_forward(layer, self.block, hidden)

    def _with_cross_token(self, number: int, hidden: Float[Tensor, "B t D"], slots: Slots) -> Float[Tensor, "B t D"]:
        assert self.cross_tokens is not None
        before = self.cross_state(hidden, slots).detach()
        token = before + self.cross_tokens[number].to(hidden.dtype)
        self.carried.append(token)
        place = slots.at(self.num_tokens)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.scatter(1, place, token[:, None])

    def cross_state(self, hidden: Float[Tensor, "B t D"], slots: Slots) -> Float[Tensor, "B D"]:
        """What the cross token of a layer is added to: what became of it in the layer before."""
        return hidden_at(hidden, slots.at(self.num_tokens))

    def _merged(
        self, number: int, hidden: Float[Tensor, "B t D"], slots: Slots, mask: Tensor | None
    ) -> tuple[Float[Tensor, "B s D"], Slots]:
        queries, keys = self.read["q_proj"], self.read["k_proj"]
        importance = self._importance(queries, keys, slots, mask)
        metric = keys if self.options.importance == "cosine" else self._heads(keys).mean(dim=1)
        matching = match_tokens(metric, importance.detach(), self.is_candidate(slots), self.steps[number])
        sizes = torch.ones_like(slots.columns, dtype=importance.dtype) if slots.sizes is None else slots.sizes
        hidden, sizes = ensemble(hidden, sizes, importance, matching)
        leaves = torch.zeros_like(slots.is_token).scatter(1, matching.sources, matching.is_source)
        stays = slots.is_token & ~leaves
        order = stays.int().argsort(dim=1, descending=True, stable=True)[:, : self._width(number, slots)]
        into = slots.columns.gather(1, matching.targets)
        own = slots.columns.gather(1, matching.sources)
        moves = torch.arange(self.num_tokens + 1, device=hidden.device).repeat(len(hidden), 1)
        moves = moves.scatter(1, own, torch.where(matching.is_source, into, own))
        left = replace(
            slots,
            columns=slots.columns.gather(1, order),
            is_token=stays.gather(1, order),
            sizes=sizes.gather(1, order),
            lives_in=moves.gather(1, slots.lives_in),
        )
        return hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1])), left

    def _width(self, number: int, slots: Slots) -> int:
        """Slots of the longest row behind a layer."""
        return slots.columns.shape[1] - min(self.steps[number])

    def _importance(
        self, queries: Float[Tensor, "B t C"], keys: Float[Tensor, "B t C"], slots: Slots, mask: Tensor | None
    ) -> Float[Tensor, "B t"]:
        guide, wide = self.guide(slots), torch.promote_types(keys.dtype, torch.float32)
        queries, keys = queries.to(wide), keys.to(wide)
        if self.options.importance == "none":
            return torch.zeros(keys.shape[:2], dtype=wide, device=keys.device)
        if self.options.importance == "cosine":
            # Without a guide, all patches together.
            asked = queries.mean(dim=1) if guide is None else hidden_at(queries, guide)
            return torch.cosine_similarity(keys, asked[:, None], dim=-1)
        return received_attention(self._heads(queries), self._heads(keys), mask, slots.is_token, guide)

    def _heads(self, vectors: Float[Tensor, "B t C"]) -> Float[Tensor, "B H t d"]:
        return vectors.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _note(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.read[name] = output

    def _check_attention(self, implementation: str) -> None:
        if self.options.proportional and "flash" in implementation:
            raise OptionError(
                f"an encoder under {implementation}, which cannot count a merged token as several",
                expected="an encoder under sdpa or eager",
                do="load it with attn_implementation={'vision_config': 'sdpa'}, or set `proportional` to false",
            )


def received_attention(
    queries: Float[Tensor, "B H t d"],
    keys: Float[Tensor, "B H t d"],
    mask: Tensor | None,
    is_token: Bool[Tensor, "B t"],
    guide: Int[Tensor, " B"] | None,
) -> Float[Tensor, "B t"]:
    """What each token is paid by all tokens but the guide, as a mean, and by the guide beside that.

    Args:
        queries: Of a layer.
        keys: Of it.
        mask: Added to the scores.
        is_token: False for those who pay nothing.
        guide: A token of each row; None for the mean of all.
    """
    scores = (queries @ keys.transpose(2, 3)) * queries.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    paid = scores.softmax(dim=-1).mean(dim=1)
    pays = is_token if guide is None else is_token.scatter(1, guide[:, None], False)
    by_all = (paid * pays[..., None]).sum(dim=1) / pays.sum(dim=1, keepdim=True)
    return by_all if guide is None else by_all + hidden_at(paid, guide)


def spread(hidden: Float[Tensor, "B t D"], slots: Slots, num_tokens: int, *, nothing: float) -> Float[Tensor, "B T D"]:
    """The hidden states of an encoder's own tokens at their own places.

    Args:
        hidden: Of what is left.
        slots: Which tokens that is.
        num_tokens: The encoder's own.
        nothing: What stands at the places of those that have left.
    """
    is_own = slots.is_token & (slots.columns < num_tokens)
    places = torch.where(is_own, slots.columns, num_tokens)  # the rest goes behind the end, and is cut off
    full = torch.full(
        (len(hidden), num_tokens + 1, hidden.shape[-1]), nothing, dtype=hidden.dtype, device=hidden.device
    )
    return full.scatter(1, places[..., None].expand_as(hidden), hidden)[:, :num_tokens]


def hidden_at(hidden: Float[Tensor, "B t D"], slots: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """The hidden state in one slot of each row."""
    return hidden.gather(1, slots[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]


def _with_cross_slot(slots: Slots, num_tokens: int) -> Slots:
    column = slots.columns.new_full((len(slots.columns), 1), num_tokens)
    columns = torch.cat([slots.columns, column], dim=1)
    is_token = torch.cat([slots.is_token, torch.ones_like(column, dtype=torch.bool)], dim=1)
    return replace(slots, columns=columns, is_token=is_token)
