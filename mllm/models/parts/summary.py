"""What is trained, as the optimiser and a reader of the log need it: by part."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn

from mllm.models.parts.adapters import COPY
from mllm.models.parts.inventory import part_of, parts_of
from mllm.models.parts.options import PartOptions
from mllm.models.parts.quantization import full_shape


@dataclass(frozen=True)
class PartSummary:
    """A row of the table that a run shows before it starts."""

    name: str
    mode: str
    parameters: int
    trainable: int
    learning_rate: float | None
    adapted: int


def learning_rate_groups(
    model: nn.Module, options: Mapping[str, PartOptions], *, learning_rate: float, weight_decay: float
) -> list[dict]:
    """Optimiser groups: one for each part and decay, with the part's learning rate and its name for logs.

    Vectors (norms and biases) are not decayed.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = parts_of(plain)
    groups: dict[tuple[str, bool], dict] = {}
    for full_name, parameter in plain.named_parameters():
        if not parameter.requires_grad:
            continue
        name = part_of(full_name, parts.values())
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # a sharded matrix is a vector of none
        own = options.get(name, PartOptions()).learning_rate
        group = groups.setdefault(
            (name, decays),
            {
                "name": f"{name}/{'decayed' if decays else 'not decayed'}",
                "params": [],
                "lr": learning_rate if own is None else own,
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def summarize_parts(
    model: nn.Module, options: Mapping[str, PartOptions], *, learning_rate: float
) -> list[PartSummary]:
    """Count what is there, what is trained, and how many modules carry an adapter, part by part."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = parts_of(plain)
    counts = {name: [0, 0, 0] for name in parts}
    for full_name, parameter in plain.named_parameters():
        count = counts[part_of(full_name, parts.values())]
        is_added = f".{COPY}." in full_name or ".lora_" in full_name
        count[0] += 0 if is_added else count_elements(parameter)
        count[1] += count_elements(parameter) if parameter.requires_grad else 0
        count[2] += full_name.endswith(".lora_A.default.weight")
    rows = []
    for name, (total, trainable, adapted) in counts.items():
        chosen = options.get(name, PartOptions())
        own = learning_rate if chosen.learning_rate is None else chosen.learning_rate
        rate = None if chosen.mode == "frozen" else own
        rows.append(PartSummary(name, chosen.mode, total, trainable, rate, adapted))
    return rows


def count_elements(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for, also where it is packed or sharded."""
    return whole_shape(parameter).numel()


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, also where it is packed in 4 bits or its share on this rank is empty (ZeRO-3)."""
    packed = full_shape(parameter)
    return packed if packed is not None else getattr(parameter, "ds_shape", parameter.shape)
