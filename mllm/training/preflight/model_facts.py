"""What a preflight tells of the model: its parts, and the groups of the optimiser."""

from collections.abc import Mapping

from peft import PeftModel
from torch import nn

from mllm.models.parts import (
    PartOptions,
    adapted_modules,
    learning_rate_groups,
    part_of,
    parts_of,
    summarize_parts,
)
from mllm.training.preflight.memory import Layers
from mllm.training.preflight.report import GroupFacts, PartFacts

SHOWN_NAMES = 3


def part_facts(
    model: nn.Module, options: Mapping[str, PartOptions], layers: Mapping[str, Layers], *, learning_rate: float
) -> tuple[PartFacts, ...]:
    """Of every part how large it is and how it is trained.

    Args:
        model: With its modes applied.
        options: By part name.
        layers: Of every part.
        learning_rate: The run's.
    """
    adapted: dict[str, list[str]] = {}
    if isinstance(model, PeftModel):
        parts = parts_of(model.get_base_model()).values()
        for name in adapted_modules(model):
            adapted.setdefault(part_of(name, parts), []).append(name)
    facts = []
    for summary in summarize_parts(model, options, learning_rate=learning_rate):
        chosen, names = options.get(summary.name, PartOptions()), adapted.get(summary.name, [])
        facts.append(
            PartFacts(
                name=summary.name,
                mode=summary.mode,
                parameters=summary.parameters,
                trained=summary.trainable,
                learning_rate=summary.learning_rate,
                num_layers=layers[summary.name].count,
                layers=chosen.layers,
                quantize=chosen.quantize,
                checkpointing=layers[summary.name].is_checkpointed,
                num_adapted=len(names),
                adapted=tuple(names[:SHOWN_NAMES]),
            )
        )
    return tuple(facts)


def group_facts(
    model: nn.Module, options: Mapping[str, PartOptions], *, learning_rate: float, weight_decay: float
) -> tuple[GroupFacts, ...]:
    """The groups that the optimiser will be given."""
    groups = learning_rate_groups(model, options, learning_rate=learning_rate, weight_decay=weight_decay)
    return tuple(
        GroupFacts(
            name=group["name"],
            tensors=len(group["params"]),
            parameters=sum(parameter.numel() for parameter in group["params"]),
            learning_rate=group["lr"],
            weight_decay=group["weight_decay"],
        )
        for group in groups
    )
