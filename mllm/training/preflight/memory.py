"""How much memory a rank will need, by a formula that can be read. Nothing is run but connectors, on one item each.

Weights, gradients and optimiser state are counted exactly, as sharding divides them. What the backward needs of the
forward is estimated: for every position and every layer that a gradient passes, the inputs and outputs of the layer's
linear modules, and twice the layer's own input for its norms. With checkpointing it is one input per layer, and one
whole layer. The largest micro-batch counts; so does the widest layer of a frozen encoder, where that alone is more.
Not counted: copies while an optimiser steps, buffers of collectives, what the allocator and a GPU's context hold.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from mllm.models.loss import CHUNK_BYTES, LARGE_CHUNK_BYTES
from mllm.models.mixed_encoder import MixedEncoder
from mllm.models.parts import Part, PartOptions, chosen_layers, layers_of, own_modules

OPTIMIZER_STATES: dict[str, tuple[int, float | None]] = {
    "adamw_torch": (2, None), "adamw_torch_fused": (2, None), "adamw_torch_8bit": (2, 1), "adamw_torch_4bit": (2, 0.5),
    "adamw_8bit": (2, 1), "adamw_bnb_8bit": (2, 1), "paged_adamw_8bit": (2, 1), "paged_adamw_32bit": (2, 4),
    "lion_32bit": (1, 4), "lion_8bit": (1, 1), "paged_lion_32bit": (1, 4), "paged_lion_8bit": (1, 1),
    "adafactor": (0, None), "sgd": (0, None), "adagrad": (1, None), "rmsprop": (1, None),
}  # fmt: skip
"""What an optimiser keeps for each weight: how many numbers, and of how many bytes (None: as many as the weight's).
One that is not here is counted as AdamW in float32."""

SMALLEST_8_BIT = 4096
"""bitsandbytes keeps the state of smaller tensors in 4 bytes a number."""


@dataclass(frozen=True)
class Sharding:
    """Over how many ranks each kind of memory is divided: 1 where every rank has all of it.

    Args:
        name: "none", "ZeRO-2", "FSDP", ...
        weights: Of the model.
        gradients: Of what is trained.
        optimizer: Its state.
        is_half: Whether weights and gradients are held in two bytes a number, and by the optimiser in float32.
    """

    name: str = "none"
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    is_half: bool = False


@dataclass(frozen=True)
class Layers:
    """The layers of a part as the estimate sees them.

    Args:
        widths: Of each layer the numbers that its backward needs, for one position.
        inputs: Of each layer the width of its input.
        first_trained: Number of the first layer that has something to train; None where nothing of the part is.
        is_checkpointed: Whether activations within a layer are computed again.
        count: How many layers the part is a stack of; 0 where it is none, and counted here as if it were one.
    """

    widths: tuple[int, ...]
    inputs: tuple[int, ...]
    first_trained: int | None
    is_checkpointed: bool = False
    count: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a rank needs at the most.

    Args:
        weights: Of the model, adapters included; and of the reference, where that is a model of its own.
        gradients: Of what is trained.
        optimizer: Its state.
        activations: What the backward needs of the forward of the largest micro-batch.
        logits: Of one chunk of supervised tokens.
        batch: The tensors of the largest micro-batch.
        sharding: How the first three are divided.
        total: All together.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    batch: int
    sharding: str
    total: int = field(init=False)

    def __post_init__(self):
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.batch)
        object.__setattr__(self, "total", sum(parts))


def layers_of_part(model: PreTrainedModel, part: Part, chosen: PartOptions, *, is_checkpointed: bool) -> Layers:
    """What the estimate has to know of a part, from the model as it was loaded, before adapters are put on it."""
    stacked = layers_of(model, part)
    names = stacked or own_modules(model, part)
    linear = [_linear_modules(model.get_submodule(name)) for name in names]
    inputs = [modules[0].in_features if modules else 0 for modules in linear]
    norms = 2 if stacked else 0
    first = None if chosen.mode == "frozen" else 0
    if chosen.layers is not None:
        first = names.index(chosen_layers(model, part, chosen.layers)[0])
    return Layers(
        widths=tuple(
            norms * width + sum(module.in_features + module.out_features for module in modules)
            for width, modules in zip(inputs, linear, strict=True)
        ),
        inputs=tuple(inputs),
        first_trained=first,
        is_checkpointed=is_checkpointed,
        count=len(stacked),
    )


def kept_numbers(layers: Layers, *, has_gradient: bool) -> int:
    """Numbers kept for the backward, for one position that goes through the part.

    Args:
        layers: The part.
        has_gradient: Whether a gradient goes on to what is in front of the part.

    Example: layers of widths 10 and 10 with inputs of 2 keep 20, with checkpointing 2 + 2 + 10; where only the second
    layer is trained, and nothing in front of it, 10.
    """
    first = 0 if has_gradient else layers.first_trained
    if first is None or not layers.widths[first:]:
        return 0
    if layers.is_checkpointed:
        return sum(layers.inputs[first:]) + max(layers.widths[first:])
    return sum(layers.widths[first:])


def activation_numbers(stacks: Sequence[Sequence[tuple[Layers, int]]], text: tuple[Layers, int]) -> int:
    """Numbers kept for the backward of one micro-batch.

    Args:
        stacks: Of each modality its parts from the media on (encoder, connector), with how many positions go through.
        text: The same of the language model.
    """
    kept, is_trained_before = 0, False
    for stack in stacks:
        has_gradient = False
        for layers, positions in stack:
            kept += positions * kept_numbers(layers, has_gradient=has_gradient)
            has_gradient = has_gradient or (layers.first_trained is not None and positions > 0)
        is_trained_before = is_trained_before or has_gradient
    return kept + text[1] * kept_numbers(text[0], has_gradient=is_trained_before)


def parameter_bytes(model: nn.Module, *, optim: str, sharding: Sharding) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimiser state of one rank.

    Example: a float32 matrix of 10 numbers that is trained with AdamW is 40, 40 and 80 bytes.
    """
    weights = gradients = 0
    state = 0.0
    for parameter in model.parameters():
        number = parameter.element_size()
        if sharding.is_half and parameter.is_floating_point():
            number = 2
        weights += parameter.numel() * number
        if parameter.requires_grad:
            gradients += parameter.numel() * number
            state += _state_bytes(parameter, optim, is_half=sharding.is_half)
    return weights // sharding.weights, gradients // sharding.gradients, int(state) // sharding.optimizer


def logit_bytes(num_supervised: int, vocabulary: int, *, device: str) -> int:
    """Bytes of the logits of one chunk, which their gradient takes over."""
    return min(num_supervised * vocabulary * 4, CHUNK_BYTES.get(device, LARGE_CHUNK_BYTES))


def media_positions(encoder: nn.Module, media: torch.Tensor | None) -> int:
    """How many positions an encoder has for the media of a batch: what its first convolutions make of them.

    Args:
        encoder: It cuts images into patches with one convolution (as spectrograms, whose patches may overlap), or
            sounds into frames with several.
        media: Its input.

    Example: two images of 3 x 32 x 32 in patches of 16 x 16 are 8 positions.

    Of several encoders the most that one has: each has layers of its own.
    """
    mixed = next((one for one in encoder.modules() if isinstance(one, MixedEncoder)), None)
    if mixed is not None and media is not None:
        sides = [reading["image_size"] for reading in mixed.config.readings]
        views = [media.new_empty(*media.shape[:2], side, side, device="meta") for side in sides]
        return max(media_positions(*pair) for pair in zip(mixed.encoders.values(), views, strict=True))
    convolutions = [one for one in encoder.modules() if isinstance(one, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    if media is None or not convolutions:
        return 0
    if isinstance(convolutions[0], nn.Conv1d):
        return len(media) * media.shape[-1] // math.prod(one.stride[0] for one in convolutions)
    first = convolutions[0]
    return media.numel() // (first.in_channels * math.prod(first.stride))


def batch_bytes(batch: Mapping[str, object]) -> int:
    """Bytes of the tensors of a micro-batch."""
    return sum(one.numel() * one.element_size() for one in batch.values() if isinstance(one, torch.Tensor))


def _state_bytes(parameter: nn.Parameter, optim: str, *, is_half: bool) -> float:
    count, size = OPTIMIZER_STATES.get(optim, (2, 4.0))
    if size is None:
        size = 4.0 if is_half else float(parameter.element_size())
    elif size == 1 and parameter.numel() < SMALLEST_8_BIT:
        size = 4.0
    return (count * size + (4.0 if is_half else 0.0)) * parameter.numel()


def _linear_modules(module: nn.Module) -> list[nn.Linear]:
    return [one for one in module.modules() if isinstance(one, nn.Linear)]
