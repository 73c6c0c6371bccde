"""Adapters by PEFT: where they stand, and how parts trained in full are saved beside them."""

import warnings
from collections.abc import Mapping

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from mllm.errors import OptionError
from mllm.models.parts.inventory import Part, linear_modules, own_modules
from mllm.models.parts.layers import chosen_layers
from mllm.models.parts.options import PartOptions

ADAPTER = "default"
COPY = f"modules_to_save.{ADAPTER}"
"""Where PEFT keeps the trained copy of a module, below the module's own name."""


def adapt(model: PreTrainedModel, parts: Mapping[str, Part], options: Mapping[str, PartOptions]) -> PeftModel:
    """Put LoRA on the linear layers of the "lora" parts, each with its own rank and alpha.

    Parts trained in full go through PEFT's `modules_to_save`. It copies modules: a parameter that stands alone beside
    them (the `image_newline` of LLaVA-NeXT and LLaVA-OneVision) cannot be saved that way, and stays as it is.
    """
    targets: dict[str, PartOptions] = {}
    saved: list[str] = []
    for name, part in parts.items():
        chosen = options.get(name, PartOptions())
        if chosen.mode == "lora":
            targets |= dict.fromkeys(lora_targets(model, part, chosen), chosen)
        elif chosen.mode == "full":
            saved += trained_modules(model, part, chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name it is about to drop
        adapted = get_peft_model(model, _lora_config(targets, saved), adapter_name=ADAPTER)
    if targets:
        # PEFT shortens long lists of names to common endings. What is saved shall be what was meant.
        adapted.peft_config[ADAPTER].target_modules = set(targets)
    if adapted_modules(adapted) != sorted(targets):
        raise AssertionError("adapters stand elsewhere than on the modules that were named")
    if copied_modules(adapted) != sorted(saved):
        raise AssertionError("other modules were copied than those that were named")
    return adapted


def trained_modules(model: nn.Module, part: Part, chosen: PartOptions) -> list[str]:
    """Full names of the modules that "full" opens in a part: all of its own, or the chosen layers."""
    return own_modules(model, part) if chosen.layers is None else chosen_layers(model, part, chosen.layers)


def lora_targets(model: nn.Module, part: Part, chosen: PartOptions) -> list[str]:
    """Full names of the linear layers that carry an adapter.

    Raises:
        OptionError: There are none, in the part or in the chosen layers.
    """
    names, where = linear_modules(model, part), ""
    if chosen.layers is not None:
        layers = tuple(f"{layer}." for layer in chosen_layers(model, part, chosen.layers))
        names, where = [name for name in names if name.startswith(layers)], f" in layers {chosen.layers}"
    if not names:
        raise OptionError(
            f"parts: {part.name} = lora, and it has no torch.nn.Linear{where} to put adapters on",
            expected="linear layers (GPT-2 has its own kind, Gemma 3's connector is a bare matrix)",
            do=f"set `{part.name}: full` or `frozen`, or choose another model",
        )
    return names


def adapted_modules(model: PeftModel) -> list[str]:
    """Full names of the modules that carry an adapter, sorted."""
    return sorted(
        name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)
    )


def copied_modules(model: PeftModel) -> list[str]:
    """Full names of the modules that are trained in full beside an adapter, as a copy, sorted."""
    return sorted(
        name for name, module in model.get_base_model().named_modules() if isinstance(module, ModulesToSaveWrapper)
    )


def _lora_config(targets: Mapping[str, PartOptions], saved: list[str]) -> LoraConfig:
    if not targets:
        # Beside quantized weights, which cannot be saved with the model: PEFT saves the copies alone.
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=saved, task_type="CAUSAL_LM")
    first = next(iter(targets.values()))
    return LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=first.dropout,
        use_dora=first.dora,
        target_modules=list(targets),
        rank_pattern={f"^{name}$": chosen.rank for name, chosen in targets.items() if chosen.rank != first.rank},
        alpha_pattern={f"^{name}$": chosen.alpha for name, chosen in targets.items() if chosen.alpha != first.alpha},
        modules_to_save=saved or None,
        task_type="CAUSAL_LM",
    )
