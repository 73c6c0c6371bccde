"""Weights of 4 bits (QLoRA), by bitsandbytes: the linear layers of the named parts and no others."""

import importlib.util
import re
from collections.abc import Collection, Mapping

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from mllm.errors import OptionError
from mllm.models.parts.inventory import Part, linear_modules, part_of, parts_of


def four_bit_config(
    skeleton: PreTrainedModel, parts: Collection[str], *, compute_dtype: torch.dtype
) -> BitsAndBytesConfig:
    """What `from_pretrained` needs to load the linear layers of these parts as nf4, and their constants, too.

    transformers takes the modules to leave alone by pattern, so every other linear layer is named in full.

    Args:
        skeleton: The model as its class builds it, best without memory (on the meta device).
        parts: Names of parts.
        compute_dtype: In which the products are computed.

    Raises:
        OptionError: No bitsandbytes, an unknown part, or one without linear layers.
    """
    chosen = set(four_bit_names(skeleton, parts))
    spared = [
        name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear) and name not in chosen
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[f"^{re.escape(name)}$" for name in spared],
    )


def four_bit_names(model: PreTrainedModel, parts: Collection[str]) -> list[str]:
    """Full names of the layers that are to be quantized in these parts.

    Raises:
        OptionError: No bitsandbytes, an unknown part, or one without linear layers.
    """
    _check_bitsandbytes()
    known = parts_of(model)
    names = []
    for name in parts:
        if name not in known:
            raise OptionError(f"quantize: {name!r}", expected=f"some of {', '.join(known)}", do="correct the name")
        found = linear_modules(model, known[name])
        if not found:
            raise OptionError(
                f"parts: {name}: quantize, and the part has no torch.nn.Linear",
                expected="a part with linear layers",
                do="remove `quantize`",
            )
        names += found
    return names


def four_bit_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that are held in 4 bits, sorted."""
    return sorted(
        name.removesuffix(".weight").removesuffix(".base_layer")
        for name, parameter in model.named_parameters()
        if full_shape(parameter) is not None
    )


def keep_as_loaded(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights anew.

    On CPUs with bfloat16 instructions it does so at the first call in eval mode, for speed: that rounds the constants,
    is not undone when training goes on, and fails for layers narrower than a block of 64.
    """
    modules = dict(model.named_modules())
    for name in four_bit_modules(model):
        modules[name].support_avx512bf16_for_cpu = False


def check_quantized(model: PreTrainedModel, wanted: Collection[str], parts: Mapping[str, Part]) -> None:
    """The parts held in 4 bits are those that shall be.

    Raises:
        OptionError: A part is and shall not be, or the other way round.
    """
    found = {part_of(name, parts.values()) for name in four_bit_modules(model)}
    if found != set(wanted):
        raise OptionError(
            f"quantized parts: {', '.join(sorted(found)) or 'none'}",
            expected=f"{', '.join(sorted(wanted)) or 'none'}, as `parts` says",
            do="load the model with load_model(..., quantize=quantized_parts(options))",
        )


def full_shape(parameter: nn.Parameter) -> torch.Size | None:
    """The shape of a weight that is packed in 4 bits; None where it is not."""
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes, which need not be there to be asked
    return None if state is None else state.shape


def _check_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OptionError(
            "quantize: 4bit, and bitsandbytes is not installed",
            expected="bitsandbytes, which runs on Linux",
            do="install this project with its extra `bnb`: pip install '.[bnb]' in the checkout; or remove `quantize`",
        )
