"""What a decoder layer is handed, whatever its family calls it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache

from mllm.errors import OptionError
from mllm.shapes import Float, Int, Tensor


def named_inputs(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states, and what else a layer is given, by name; some language models hand it over by its place."""
    if len(args) == 1:
        return args[0], dict(kwargs)
    names = list(inspect.signature(layer.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    return given.pop(names[0]), given


def cache_in(kwargs: Mapping[str, Any]) -> Cache | None:
    """Of what a layer is given: families call it by different names."""
    return next((value for value in kwargs.values() if isinstance(value, Cache)), None)


def with_values(
    hidden: Float[Tensor, "B M D"], chosen: list[tuple[Int[Tensor, " _"], list[tuple[Int[Tensor, " _"], Tensor]]]]
) -> Float[Tensor, "B M D"]:
    """Hidden states, some of them others.

    Args:
        hidden: Whose rows begin with slots that hold nothing.
        chosen: Of each row the slots that were left, and what changes, by its places among these.
    """
    for row, (left, values) in enumerate(chosen):
        num_empty = hidden.shape[1] - len(left)
        for places, value in values:
            at = places + num_empty
            hidden = hidden.index_put((torch.full_like(at, row), at), value.to(hidden.dtype))
    return hidden


def no_rotary_positions(body: nn.Module) -> OptionError:
    """The error that says so."""
    return OptionError(
        f"cuts between the layers of a {type(body).__name__}, whose layers are not handed rotary positions",
        expected="a language model with rotary positions, as all newer ones have",
        do="choose a pruner that works in front of the language model, such as visionzip or divprune",
    )
