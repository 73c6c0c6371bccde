"""Activation checkpointing by part: what its layers would keep for the backward is computed again there."""

from collections.abc import Mapping
from functools import partial

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from mllm.errors import OptionError
from mllm.models.parts.inventory import Part, part_of, parts_of
from mllm.models.parts.layers import layers_of
from mllm.models.parts.options import PartOptions


def checkpoint_parts(
    model: nn.Module, options: Mapping[str, PartOptions], *, reentrant: bool = False
) -> dict[str, int]:
    """Switch checkpointing on in the layers of the parts that ask for it, and leave the others as they are.

    A frozen encoder keeps nothing in any case, so checkpointing does nothing there. The state of the random numbers is
    kept, so dropout falls on the same places.

    Args:
        model: With its modes applied.
        options: By part name.
        reentrant: The older kind of checkpointing, which ZeRO-3 needs beside adapters. It drops gradients where a
            layer's input asks for none, so here the first trained layer's input is made to ask.

    Returns:
        How many modules are checkpointed, by part.

    Raises:
        OptionError: A part has no layers that can be checkpointed.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = parts_of(plain)
    counts = {}
    for name, chosen in options.items():
        if chosen.checkpointing:
            counts[name] = _checkpoint(plain, parts[name], reentrant=reentrant)
            if reentrant:
                _ask_for_input_gradients(plain, parts[name])
    return counts


def _checkpoint(model: nn.Module, part: Part, *, reentrant: bool) -> int:
    parts = list(parts_of(model).values())
    # transformers' own switch (`activation_checkpointing_enable`) is for a whole model; these are the flags it sets.
    found = [
        module
        for name, module in model.named_modules()
        if name and hasattr(module, "gradient_checkpointing") and _is_of(name, part, parts)
    ]
    for module in found:
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    if not found:
        raise OptionError(
            f"parts: {part.name}: checkpointing, and the part has no layers that can do it",
            expected="a part that is a stack of transformer layers",
            do="remove `checkpointing`",
        )
    return len(found)


def _is_of(name: str, part: Part, parts: list[Part]) -> bool:
    is_inside = any(name == root or name.startswith(f"{root}.") for root in part.roots)
    return is_inside and part_of(name, parts) == part.name


def _ask_for_input_gradients(model: nn.Module, part: Part) -> None:
    for name in layers_of(model, part):
        model.get_submodule(name).register_forward_pre_hook(_require_gradient)


def _require_gradient(module: nn.Module, args: tuple) -> None:
    """Of the first trained layer alone: whatever comes after it has a graph already."""
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    if is_trained and torch.is_grad_enabled() and args[0].is_leaf:
        args[0].requires_grad_(True)
