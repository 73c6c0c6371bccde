"""What can be asked of a part, and which wishes do not go together; needs no model."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mllm.errors import OptionError

MODES = ("frozen", "lora", "full")
FOUR_BIT = "4bit"
LAYER_RANGE = re.compile(r"-?\d+:|:-?\d+|-?\d+:-?\d+|last:[1-9]\d*")
SHARED = ("dropout", "dora")
"""What PEFT knows for a whole model only, so that all "lora" parts have to agree on it."""


@dataclass(frozen=True)
class PartOptions:
    """How one part is trained.

    Args:
        mode: "frozen", "lora" (adapters on its linear layers) or "full" (all its weights).
        learning_rate: Its own; the run's `learning_rate` where absent.
        rank: Of the adapters.
        alpha: Of the adapters: their output is scaled by alpha / rank.
        dropout: In front of the adapters.
        layers: Which of its layers are trained, as "12:", "0:4", "-6:" or "last:6"; all of the part where absent. With
            "full" only these layers are opened: the part's embeddings, norms and whatever else stands beside its
            layers stay frozen.
        dora: Whether adapters learn magnitude and direction apart (DoRA).
        quantize: "4bit" to hold the weights of its linear layers in 4 bits (QLoRA where the mode is "lora").
        checkpointing: Whether activations inside its layers are computed again in the backward, not kept.
    """

    mode: str = "frozen"
    learning_rate: float | None = None
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    layers: str | None = None
    dora: bool = False
    quantize: str | None = None
    checkpointing: bool = False


def check_options(parts: Collection[str], options: Mapping[str, PartOptions]) -> None:
    """Check names of parts, modes and their combination; needs no model.

    Raises:
        OptionError: An unknown part or mode, values that a part cannot have, or parts that do not go together.
    """
    for name, chosen in options.items():
        if name not in parts:
            raise OptionError(
                f"parts: {name!r}", expected=f"some of {', '.join(parts)}", do="correct the name under `parts`"
            )
        _check_part(name, chosen)
    if not any(chosen.mode != "frozen" for chosen in options.values()):
        raise OptionError(
            "every part is frozen", expected="at least one part to train", do="set a part to `full` or `lora`"
        )
    for key in SHARED:
        values = {name: getattr(chosen, key) for name, chosen in options.items() if chosen.mode == "lora"}
        if len(set(values.values())) > 1:
            raise OptionError(
                f"parts: {key} differs: {values}", expected=f"one {key} for all lora parts", do="set them equal"
            )
    adapting = [name for name, chosen in options.items() if chosen.mode == "lora" or chosen.quantize]
    if adapting and options.get("text", PartOptions()).mode == "full":
        raise OptionError(
            f"text = full beside a lora part or a quantized one ({', '.join(adapting)})",
            expected="text = lora or frozen where another part is lora or quantized",
            do="set `text: lora`, or train the other parts `full`; else a second language model would be kept",
        )


def quantized_parts(options: Mapping[str, PartOptions]) -> tuple[str, ...]:
    """The names of the parts that are held in 4 bits: what `load_model` has to know."""
    return tuple(name for name, chosen in options.items() if chosen.quantize is not None)


def _check_part(name: str, chosen: PartOptions) -> None:
    if chosen.mode not in MODES:
        raise OptionError(
            f"parts: {name}: mode = {chosen.mode!r}", expected=f"one of {', '.join(MODES)}", do="choose one"
        )
    if chosen.layers is not None and not LAYER_RANGE.fullmatch(chosen.layers):
        raise OptionError(
            f"parts: {name}: layers = {chosen.layers!r}",
            expected='a range such as "12:", "0:4", "-6:" or "last:6"',
            do="write it in quotes: YAML reads 12:16 without them as a number",
        )
    if chosen.layers is not None and chosen.mode == "frozen":
        raise OptionError(
            f"parts: {name}: layers = {chosen.layers!r}, and the part is frozen",
            expected="a range of layers to train",
            do="set `mode: lora` or `mode: full`, or remove `layers`",
        )
    if chosen.dora and chosen.mode != "lora":
        raise OptionError(
            f"parts: {name}: dora, and the part is {chosen.mode}", expected="mode = lora", do="remove `dora`"
        )
    if chosen.quantize not in (None, FOUR_BIT):
        raise OptionError(
            f"parts: {name}: quantize = {chosen.quantize!r}", expected=f"{FOUR_BIT} or null", do="correct it"
        )
    if chosen.quantize and chosen.mode == "full":
        raise OptionError(
            f"parts: {name} = full, and its weights are quantized",
            expected="quantized parts that are frozen or lora: weights of 4 bits cannot be trained themselves",
            do=f"set `{name}: {{mode: lora, quantize: {FOUR_BIT}}}`, or remove `quantize`",
        )
