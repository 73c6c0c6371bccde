"""Which parts a model has, and which of its modules and parameters belong to each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from mllm.models.configuration import MllmConfig
from mllm.models.encoders import unused_parameters
from mllm.models.stock_parts import stock_parts


@dataclass(frozen=True)
class Part:
    """A part: its name and where it stands in the model.

    Args:
        name: "image.encoder", "image.connector", "audio.encoder", "audio.connector" or "text".
        roots: Full names of modules, or of parameters that stand alone. A parameter belongs to the part with the
            longest root above it, so one part's root may stand inside another's (a merger inside a vision model).
        unused: Name prefixes of parameters that never get a gradient, left alone in every mode.
    """

    name: str
    roots: tuple[str, ...]
    unused: tuple[str, ...] = ()


def parts_of(model: PreTrainedModel) -> dict[str, Part]:
    """The parts of a composed model, or of a stock one of the table in `mllm.models.stock_parts`, by name.

    Raises:
        OptionError: A stock model of a type that is not in the table.
    """
    if isinstance(model.config, MllmConfig):
        return _composed_parts(model)
    family = stock_parts(model.config)
    return {
        name: Part(name, roots, tuple(prefix for prefix in family.unused(model.config) if _is_under(prefix, roots)))
        for name, roots in family.roots.items()
    }


def part_of(parameter_name: str, parts: Iterable[Part]) -> str:
    """The part that the parameter (or module) of this full name belongs to."""
    found = [(len(root), part.name) for part in parts for root in part.roots if _is_under(parameter_name, (root,))]
    assert found, f"{parameter_name} belongs to no part"
    return max(found)[1]


def own_modules(model: nn.Module, part: Part) -> list[str]:
    """The largest modules that hold parameters of this part and of no other, and that can be called.

    A root that has another part's root inside it is taken apart, and so are lists of modules.
    """
    parts = list(parts_of(model).values())
    roots = {name for other in parts for name in other.roots}
    modules = dict(model.named_modules())
    found: list[str] = []
    for root in part.roots:
        if root in modules:
            found += _own_below(root, modules[root], roots)
    return found


def linear_modules(model: nn.Module, part: Part) -> list[str]:
    """Full names of a part's linear layers, the language model's head left out."""
    parts = list(parts_of(model).values())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and _is_under(name, part.roots)
        and name not in part.roots
        and part_of(name, parts) == part.name
        and not name.startswith(part.unused or ("\0",))
    ]


def _composed_parts(model: PreTrainedModel) -> dict[str, Part]:
    parts = {}
    for modality, tower in model.model.towers.items():
        root = f"model.{modality}_tower"
        if tower.encoder is not None:
            unused = tuple(f"{root}.encoder.{prefix}" for prefix in unused_parameters(tower.encoder.config))
            parts[f"{modality}.encoder"] = Part(f"{modality}.encoder", (f"{root}.encoder",), unused)
        parts[f"{modality}.connector"] = Part(f"{modality}.connector", (f"{root}.connector",))
    parts["text"] = Part("text", ("model.language_model", "lm_head"))
    return parts


def _own_below(name: str, module: nn.Module, roots: set[str]) -> Iterator[str]:
    is_shared = any(root.startswith(f"{name}.") for root in roots)
    if not is_shared and not isinstance(module, nn.ModuleList | nn.ModuleDict):
        yield name
        return
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}"
        if full_name not in roots and any(True for _ in child.parameters()):
            yield from _own_below(full_name, child, roots)


def _is_under(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)
