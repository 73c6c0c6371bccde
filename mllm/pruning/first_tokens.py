"""The cross tokens of a language model: what CrossGET adds to the first token of each row, layer by layer."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mllm.pruning.anatomy import Anatomy
from mllm.shapes import Float, Int, Tensor


class FirstTokens:
    """In front of each decoder layer of a prompt, the first token of each row loses its gradient and gains a vector.

    Later tokens attend to it. Rows of text alone have it as well, as in the published training.

    Args:
        anatomy: Of the model.
        tokens: Of each layer.
    """

    def __init__(self, anatomy: Anatomy, tokens: Float[Tensor, "layers D"]):
        self.anatomy = anatomy
        self.tokens = tokens
        self.places: tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None = None
        self.carried: dict[int, Float[Tensor, "n D"]] = {}
        """In front of each layer of the last prompt, those of all rows (of all segments, where a row is packed)."""

    def take_hold(self, stack: ExitStack) -> None:
        """Put hooks on the language model, behind those that take tokens out."""
        stack.callback(self.anatomy.body.register_forward_pre_hook(self._before_body, with_kwargs=True).remove)
        for number, layer in enumerate(self.anatomy.layers):
            stack.callback(layer.register_forward_pre_hook(self._before_layer(number), with_kwargs=True).remove)

    def _before_body(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        self.places, self.carried = None, {}
        if cache is None or cache.get_seq_length() == 0:
            embeds = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
            self.places = first_places(embeds, kwargs.get("attention_mask"), kwargs.get("segment_lengths"))

    def _before_layer(self, number: int) -> Any:
        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if self.places is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            token = hidden[self.places].detach() + self.tokens[number].to(hidden.dtype)
            self.carried[number] = token
            hidden = hidden.index_put(self.places, token)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook


def first_places(
    embeds: Tensor, mask: Any, segment_lengths: tuple[int, ...] | None
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Rows and columns of first tokens.

    Args:
        embeds: Of the rows [B, T, ...].
        mask: Of tokens, where there is padding [B, T]; others say nothing of it.
        segment_lengths: Of a packed row.
    """
    if segment_lengths is not None:
        ends = torch.tensor(segment_lengths, device=embeds.device).cumsum(0)
        return torch.zeros_like(ends), ends - torch.tensor(segment_lengths, device=embeds.device)
    rows = torch.arange(len(embeds), device=embeds.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return rows, torch.zeros_like(rows)
    return rows, mask[:, -embeds.shape[1] :].int().argmax(dim=1)
