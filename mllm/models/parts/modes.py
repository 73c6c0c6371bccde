"""Freeze, open or adapt each part of a model."""

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from mllm.errors import OptionError
from mllm.models.parts.adapters import COPY, adapt
from mllm.models.parts.frozen import hold_frozen_encoders
from mllm.models.parts.inventory import Part, part_of, parts_of
from mllm.models.parts.layers import chosen_layers
from mllm.models.parts.options import PartOptions, check_options, quantized_parts
from mllm.models.parts.quantization import check_quantized


def apply_modes(model: PreTrainedModel, options: Mapping[str, PartOptions]) -> PreTrainedModel | PeftModel:
    """Freeze, open or adapt each part. Parts that are not named are frozen.

    With any adapter in the run, every part trained in full goes through PEFT's `modules_to_save`: so it is saved with
    the adapter, and its untrained copy stays in the model. Adapters are put on modules by their exact full names.

    Args:
        model: A composed model or a stock one of the table, loaded; its `requires_grad` flags are set anew.
        options: By part name.

    Returns:
        The model, wrapped by PEFT where a part is "lora" or held in 4 bits.

    Raises:
        OptionError: An unknown part or mode, a combination that cannot be saved, or weights that cannot be trained.
    """
    parts = parts_of(model)
    check_options(parts, options)
    _check_dtype(model, parts, options)
    check_quantized(model, quantized_parts(options), parts)
    model.requires_grad_(False)
    trained = {name for name, chosen in options.items() if chosen.mode != "frozen"}
    hold_frozen_encoders(model, parts.values(), frozen=set(parts) - trained)
    if quantized_parts(options) or any(chosen.mode == "lora" for chosen in options.values()):
        adapted = adapt(model, parts, options)
        freeze_unused(adapted)
        return adapted
    for name, part in parts.items():
        chosen = options.get(name, PartOptions())
        if chosen.mode == "full":
            _open(model, part, chosen)
    return model


def freeze_unused(model: nn.Module) -> None:
    """Freeze the parameters that no feature passes. PEFT opens them whenever it switches an adapter on."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    unused = tuple(prefix for part in parts_of(plain).values() for prefix in part.unused)
    for name, parameter in plain.named_parameters():
        if unused and name.replace(f".{COPY}", "").startswith(unused):
            parameter.requires_grad_(False)


def _check_dtype(model: nn.Module, parts: Mapping[str, Part], options: Mapping[str, PartOptions]) -> None:
    for full_name, parameter in model.named_parameters():
        name = part_of(full_name, parts.values())
        if parameter.dtype == torch.float16 and options.get(name, PartOptions()).mode == "full":
            raise OptionError(
                f"parts: {name} = full, and its weights are float16 (such as {full_name})",
                expected="weights of float32 or bfloat16: steps of training are lost, or overflow, in float16",
                do="set `dtype: bfloat16`, or `dtype: float32` with `bf16: true` for mixed precision",
            )


def _open(model: nn.Module, part: Part, chosen: PartOptions) -> None:
    parts = list(parts_of(model).values())
    layers = None
    if chosen.layers is not None:
        layers = tuple(f"{layer}." for layer in chosen_layers(model, part, chosen.layers))
    for name, parameter in model.named_parameters():
        is_chosen = layers is None or name.startswith(layers)
        if is_chosen and part_of(name, parts) == part.name and not name.startswith(part.unused or ("\0",)):
            parameter.requires_grad_(True)
