"""The parts of a model as it is trained: which there are, which modules they consist of, what is trained of each."""

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from mllm.errors import OptionError
from mllm.models.encoders import encoder_family

MODES = ("frozen", "lora", "full")
ADAPTER = "default"
COPY = f"modules_to_save.{ADAPTER}"
"""Where PEFT keeps the trained copy of a module, below the module's own name."""


@dataclass(frozen=True)
class PartOptions:
    """How one part is trained.

    Args:
        mode: "frozen", "lora" (adapters on its linear layers) or "full" (all its weights).
        learning_rate: Its own; the run's `learning_rate` where absent.
        rank: Of the adapters.
        alpha: Of the adapters: their output is scaled by alpha / rank.
        dropout: In front of the adapters.
    """

    mode: str = "frozen"
    learning_rate: float | None = None
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0


@dataclass(frozen=True)
class Part:
    """A part: its name and the full names of its modules in the model.

    Args:
        name: "image.encoder", "image.connector" or "text".
        modules: Roots of the part; the first module under which a parameter stands decides its part.
        unused: Name prefixes of parameters that never get a gradient, left alone in every mode.
    """

    name: str
    modules: tuple[str, ...]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartSummary:
    """A row of the table that a run shows before it starts."""

    name: str
    mode: str
    parameters: int
    trainable: int
    learning_rate: float | None
    adapted: int


def parts_of(model: PreTrainedModel) -> dict[str, Part]:
    """The parts of a composed model, by name."""
    parts = {}
    for modality, tower in model.model.towers.items():
        root = f"model.{modality}_tower"
        family = encoder_family(tower.encoder.config.model_type, where=f"{root}.encoder")
        unused = tuple(f"{root}.encoder.{prefix}" for prefix in family.unused)
        parts[f"{modality}.encoder"] = Part(f"{modality}.encoder", (f"{root}.encoder",), unused)
        parts[f"{modality}.connector"] = Part(f"{modality}.connector", (f"{root}.connector",))
    parts["text"] = Part("text", ("model.language_model", "lm_head"))
    return parts


def apply_modes(model: PreTrainedModel, options: Mapping[str, PartOptions]) -> PreTrainedModel | PeftModel:
    """Freeze, open or adapt each part. Parts that are not named are frozen.

    With any adapter in the run, every part trained in full goes through PEFT's `modules_to_save`: so it is saved with
    the adapter, and its untrained copy stays in the model. Adapters are put on modules by their exact full names.

    Args:
        model: A composed model, loaded; its `requires_grad` flags are set anew.
        options: By part name.

    Returns:
        The model, wrapped by PEFT where a part is "lora".

    Raises:
        OptionError: An unknown part or mode, a combination that cannot be saved, or weights that cannot be trained.
    """
    parts = parts_of(model)
    check_options(parts, options)
    _check_dtype(model, parts, options)
    model.requires_grad_(False)
    mode = {name: options.get(name, PartOptions()).mode for name in parts}
    if "lora" not in mode.values():
        for name, part in parts.items():
            if mode[name] == "full":
                _open(model, part)
        return model
    return _adapt(model, parts, options)


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
        decays = parameter.ndim > 1
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
        is_copy = f".{COPY}." in full_name or ".lora_" in full_name
        count[0] += 0 if is_copy else parameter.numel()
        count[1] += parameter.numel() if parameter.requires_grad else 0
        count[2] += full_name.endswith(".lora_A.default.weight")
    rows = []
    for name, (total, trainable, adapted) in counts.items():
        chosen = options.get(name, PartOptions())
        own = learning_rate if chosen.learning_rate is None else chosen.learning_rate
        rate = None if chosen.mode == "frozen" else own
        rows.append(PartSummary(name, chosen.mode, total, trainable, rate, adapted))
    return rows


def part_of(parameter_name: str, parts: Iterable[Part]) -> str:
    """The part that the parameter of this full name belongs to."""
    for part in parts:
        if any(parameter_name == root or parameter_name.startswith(f"{root}.") for root in part.modules):
            return part.name
    raise AssertionError(f"{parameter_name} belongs to no part")


def check_options(parts: Collection[str], options: Mapping[str, PartOptions]) -> None:
    """Check names of parts, modes and their combination; needs no model.

    Raises:
        OptionError: As `apply_modes` does.
    """
    for name, chosen in options.items():
        if name not in parts:
            raise OptionError(
                f"parts: {name!r}", expected=f"some of {', '.join(parts)}", do="correct the name under `parts`"
            )
        if chosen.mode not in MODES:
            raise OptionError(
                f"parts: {name}: mode = {chosen.mode!r}", expected=f"one of {', '.join(MODES)}", do="choose one"
            )
    if not any(chosen.mode != "frozen" for chosen in options.values()):
        raise OptionError(
            "every part is frozen", expected="at least one part to train", do="set a part to `full` or `lora`"
        )
    dropouts = {name: chosen.dropout for name, chosen in options.items() if chosen.mode == "lora"}
    if len(set(dropouts.values())) > 1:
        raise OptionError(
            f"parts: dropout differs: {dropouts}", expected="one dropout for all lora parts", do="set them equal"
        )
    modes = {chosen.mode for chosen in options.values()}
    if "lora" in modes and options.get("text", PartOptions()).mode == "full":
        raise OptionError(
            "text = full beside a lora part",
            expected="text = lora or frozen where another part is lora",
            do="set `text: lora`, or train the other parts `full`; else a second language model would be kept",
        )


def _check_dtype(model: nn.Module, parts: Mapping[str, Part], options: Mapping[str, PartOptions]) -> None:
    for full_name, parameter in model.named_parameters():
        name = part_of(full_name, parts.values())
        if parameter.dtype == torch.float16 and options.get(name, PartOptions()).mode == "full":
            raise OptionError(
                f"parts: {name} = full, and its weights are float16 (such as {full_name})",
                expected="weights of float32 or bfloat16: steps of training are lost, or overflow, in float16",
                do="set `dtype: bfloat16`, or `dtype: float32` with `bf16: true` for mixed precision",
            )


def _open(model: nn.Module, part: Part) -> None:
    for name, parameter in model.named_parameters():
        is_inside = any(name.startswith(f"{root}.") for root in part.modules)
        if is_inside and not name.startswith(part.unused or ("\0",)):
            parameter.requires_grad_(True)


def _adapt(model: PreTrainedModel, parts: Mapping[str, Part], options: Mapping[str, PartOptions]) -> PeftModel:
    """Put LoRA on the linear layers of the "lora" parts, each with its own rank and alpha."""
    targets: dict[str, PartOptions] = {}
    saved: list[str] = []
    for name, part in parts.items():
        chosen = options.get(name, PartOptions())
        if chosen.mode == "lora":
            targets |= dict.fromkeys(_targets(model, part), chosen)
        elif chosen.mode == "full":
            saved += part.modules
    first = next(iter(targets.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=first.dropout,
        target_modules=list(targets),
        rank_pattern={f"^{name}$": chosen.rank for name, chosen in targets.items() if chosen.rank != first.rank},
        alpha_pattern={f"^{name}$": chosen.alpha for name, chosen in targets.items() if chosen.alpha != first.alpha},
        modules_to_save=saved or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name it is about to drop
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    # PEFT shortens long lists of names to common endings. What is saved shall be what was meant.
    config.target_modules = set(targets)
    if adapted_modules(adapted) != sorted(targets):
        raise AssertionError("adapters stand elsewhere than on the modules that were named")
    freeze_unused(adapted)
    return adapted


def _targets(model: nn.Module, part: Part) -> list[str]:
    names = linear_modules(model, part)
    if not names:
        raise OptionError(
            f"parts: {part.name} = lora, and it has no torch.nn.Linear to put adapters on",
            expected="linear layers (GPT-2 has its own kind)",
            do=f"set `{part.name}: full` or `frozen`, or choose another model",
        )
    return names


def freeze_unused(model: nn.Module) -> None:
    """Freeze the parameters that no feature passes. PEFT opens them whenever it switches an adapter on."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    unused = tuple(prefix for part in parts_of(plain).values() for prefix in part.unused)
    for name, parameter in plain.named_parameters():
        if unused and name.replace(f".{COPY}", "").startswith(unused):
            parameter.requires_grad_(False)


def adapted_modules(model: PeftModel) -> list[str]:
    """Full names of the modules that carry an adapter, sorted."""
    return sorted(
        name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)
    )


def linear_modules(model: nn.Module, part: Part) -> list[str]:
    """Full names of a part's linear layers, the language model's head left out."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name.startswith(f"{root}.") for root in part.modules)
        and not name.startswith(part.unused or ("\0",))
    ]
