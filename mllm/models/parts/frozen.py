"""Frozen encoders of stock models: they stay in eval mode and leave no graph behind, whoever calls them."""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mllm.models.configuration import MllmConfig
from mllm.models.parts.inventory import Part, own_modules

_HELD: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()
"""The hooks of the modules that are held."""


def hold_frozen_encoders(model: PreTrainedModel, parts: Iterable[Part], *, frozen: Iterable[str]) -> None:
    """Hold the encoders of a stock model that are frozen, and let go of the others.

    `Trainer` sets a whole model to train mode, which would bring a frozen encoder's dropout to life; and what asks for
    gradients of inputs (adapters beside activation checkpointing) would make it keep its graph. Composed models see to
    that in `MllmTower`. Here hooks do, on the instance: they are no part of the saved state.

    Args:
        model: Before PEFT wraps it.
        parts: All of its parts.
        frozen: Names of the parts of which nothing is trained.
    """
    if isinstance(model.config, MllmConfig):
        return
    for part in parts:
        if not part.name.endswith(".encoder"):
            continue
        for name in own_modules(model, part):
            module = model.get_submodule(name)
            for handle in _HELD.pop(module, []):
                handle.remove()
            if part.name in frozen:
                _HELD[module] = _hold(module)


def _hold(module: nn.Module) -> list[RemovableHandle]:
    guard = _Guard()
    return [
        module.register_forward_pre_hook(guard.enter),
        module.register_forward_hook(guard.leave, always_call=True),
    ]


class _Guard:
    """Eval mode and no graph while a module runs; none of both where somebody opened it since."""

    def __init__(self):
        self.was_enabled: list[bool] = []

    def enter(self, module: nn.Module, args: tuple) -> None:
        self.was_enabled.append(torch.is_grad_enabled())
        if any(parameter.requires_grad for parameter in module.parameters()):
            return
        if module.training:
            module.eval()
        torch.set_grad_enabled(False)

    def leave(self, module: nn.Module, args: tuple, output: object) -> None:
        torch.set_grad_enabled(self.was_enabled.pop())
