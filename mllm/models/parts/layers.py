"""The layers of a part, and ranges of them: `layers: "12:"` opens the second half of a ViT of 24 layers."""

from collections.abc import Iterable

from peft.utils import ModulesToSaveWrapper
from torch import nn

from mllm.errors import OptionError
from mllm.models.mixed_encoder import MixedEncoder
from mllm.models.parts.inventory import Part, part_of, parts_of


def layers_of(model: nn.Module, part: Part) -> list[str]:
    """Full names of a part's layers: of the members of its longest list of modules of one class.

    Layers that no feature passes (above the feature layer of LLaVA's encoder) are not among them. Empty where the part
    has no such list. Beside adapters, the layers of the trained copies. Of several encoders those of each, one after
    the other.
    """
    return [name for root in _stacks(model, part) for name in _longest_list(model, part, root)]


def _stacks(model: nn.Module, part: Part) -> list[str]:
    """Where a part's layers are looked for: in all of it, or in each of several encoders."""
    several = [
        f"{name}.{encoder}"
        for name, module in model.named_modules()
        if isinstance(module, MixedEncoder) and ".original_module" not in name and _is_under(name, part.roots)
        for encoder in module.encoders
    ]
    return several or [""]


def _longest_list(model: nn.Module, part: Part, root: str) -> list[str]:
    parts = list(parts_of(model).values())
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({_kind(member) for member in module}) != 1:
            continue
        if ".original_module." in name or not _is_under(name, part.roots) or (root and not _is_under(name, (root,))):
            continue
        members = [f"{name}.{index}" for index in range(len(module))]
        used = [member for member in members if not f"{member}.".startswith(part.unused or ("\0",))]
        if part_of(name, parts) == part.name and len(used) > len(found):
            found = used
    return found


def chosen_layers(model: nn.Module, part: Part, layers: str) -> list[str]:
    """Full names of the layers in a range such as "12:", "0:4", "-6:" or "last:6".

    Raises:
        OptionError: The part has no layers, or the range does not lie within them.
    """
    names = layers_of(model, part)
    if not names:
        raise OptionError(
            f"parts: {part.name}: layers = {layers!r}, and the part has no list of layers",
            expected="a part that is a stack of layers",
            do="remove `layers`",
        )
    if len(stacks := _stacks(model, part)) > 1:
        raise OptionError(
            f"parts: {part.name}: layers = {layers!r}, and the part has several encoders, {', '.join(stacks)}",
            expected="all layers or none: a range says nothing of which encoder's they are",
            do="remove `layers`",
        )
    start, stop = _bounds(layers, len(names))
    if not 0 <= start < stop <= len(names):
        raise OptionError(
            f"parts: {part.name}: layers = {layers!r}, and its layers are {names[0]} to {names[-1]}",
            expected=f"a range within 0:{len(names)}",
            do="correct it; layers that no feature passes do not count",
        )
    return names[start:stop]


def _is_under(name: str, roots: Iterable[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _kind(member: nn.Module) -> type:
    """Of a layer that is trained as a copy: what was copied."""
    return type(member.original_module if isinstance(member, ModulesToSaveWrapper) else member)


def _bounds(layers: str, count: int) -> tuple[int, int]:
    first, _, second = layers.partition(":")
    if first == "last":
        return count - int(second), count
    start, stop = int(first or 0), int(second or count)
    return start + count * (start < 0), stop + count * (stop < 0)
