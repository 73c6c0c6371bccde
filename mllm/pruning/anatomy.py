"""Where in a model a pruner takes hold: its decoder layers, its encoder, what leads media to the language model.

A model that is not in here cannot be pruned, and says why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mllm.errors import OptionError, RowError
from mllm.models import MllmForConditionalGeneration
from mllm.models.parts import Part, layers_of, parts_of
from mllm.models.stock_parts import STOCK_PARTS
from mllm.shapes import Bool, Int, Tensor

UNSUPPORTED = {
    "gemma3": "the tokens of a picture attend to each other in both directions, by a mask of pairs",
    "qwen2_audio": "it reads sounds, and visual tokens are what pruners drop",
}
"""Stock models of `STOCK_PARTS` that cannot be pruned, and why."""


@dataclass(frozen=True)
class Anatomy:
    """What is where in a model.

    Args:
        model: Without adapters around it.
        backbone: The model without its head.
        body: The language model without its head.
        layers: Its decoder layers.
        placeholders: Token ids that stand for visual tokens, by modality.
    """

    model: PreTrainedModel
    backbone: PreTrainedModel
    body: PreTrainedModel
    layers: tuple[nn.Module, ...]
    placeholders: Mapping[str, int]

    @property
    def is_composed(self) -> bool:
        """Whether it is one of ours."""
        return isinstance(self.model, MllmForConditionalGeneration)


def items_of_rows(
    marks: Mapping[str, Bool[Tensor, "B T"]], lengths: Mapping[str, Sequence[int]]
) -> list[list[Int[Tensor, " _"]]]:
    """Which columns each visual item of each row has.

    Args:
        marks: Where the tokens of each modality stand.
        lengths: How many each of its items has, in order of appearance.

    Raises:
        RowError: An item would go on in the next row.
    """
    rest = {modality: iter(lengths.get(modality, ())) for modality in marks}
    rows: list[list[Tensor]] = []
    for row in range(len(next(iter(marks.values())))):
        items: list[Tensor] = []
        for modality, mark in marks.items():
            columns = mark[row].nonzero()[:, 0]
            while len(columns):
                length = next(rest[modality], 0)
                if not 0 < length <= len(columns):
                    raise _misfit(marks[modality], lengths[modality])
                items.append(columns[:length])
                columns = columns[length:]
        rows.append(sorted(items, key=lambda item: int(item[0])))
    return rows


def anatomy_of(model: PreTrainedModel | PeftModel) -> Anatomy:
    """Look a model up.

    Raises:
        OptionError: It is of a class that cannot be pruned, or its language model is.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    is_composed = isinstance(plain, MllmForConditionalGeneration)
    if not is_composed and (plain.config.model_type not in STOCK_PARTS or plain.config.model_type in UNSUPPORTED):
        raise _unsupported(plain.config)
    placeholders = _placeholders(plain.config, is_composed=is_composed)
    if not placeholders:
        raise OptionError(
            "a model without a tower for images or videos",
            expected="a model with visual tokens",
            do="run it without a pruner",
        )
    _check_layer_types(plain.config.get_text_config())
    body = plain.get_decoder()
    layers = tuple(plain.get_submodule(name) for name in layers_of(plain, _text_part(plain)))
    return Anatomy(plain, plain.model, body, layers, placeholders)


def _misfit(mark: Bool[Tensor, "B T"], lengths: Sequence[int]) -> RowError:
    return RowError(
        f"rows with {mark.sum(dim=1).tolist()} visual tokens, for items of {list(lengths)}",
        expected="rows that hold whole items, in this order",
        do="order media as the rows have them; under beam search with several pictures a row, where old versions of "
        "transformers mix them up, install a newer one",
    )


def _text_part(plain: PreTrainedModel) -> Part:
    return parts_of(plain)["text"]


def _placeholders(config: PreTrainedConfig, *, is_composed: bool) -> dict[str, int]:
    if is_composed:
        towers = config.tower_configs.items()
        return {modality: one.placeholder_token_id for modality, one in towers if modality in ("image", "video")}
    names = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}
    fields = config.to_dict()
    found = {
        modality: next((fields[name] for name in of if fields.get(name) is not None), None)
        for modality, of in names.items()
    }
    return {modality: token for modality, token in found.items() if token is not None}


def _check_layer_types(text: PreTrainedConfig) -> None:
    """Only full attention lets tokens leave: other layers count tokens by their distance, or carry a state along."""
    fields = text.to_dict()
    types = fields.get("layer_types") or ()
    others = sorted(set(types) - {"full_attention"})
    if not types and fields.get("sliding_window") is not None and fields.get("use_sliding_window", True):
        others = ["sliding_attention"]
    if others:
        raise OptionError(
            f"a {text.model_type} language model with layers of {', '.join(others)}",
            expected="a language model all of whose layers are full attention",
            do="run it without a pruner: in such layers the place of a token, or a state, would be wrong",
        )


def _unsupported(config: PreTrainedConfig) -> OptionError:
    reason = UNSUPPORTED.get(config.model_type)
    choices = [name for name in STOCK_PARTS if name not in UNSUPPORTED]
    return OptionError(
        f"a model of type {config.model_type!r}" + (f": {reason}" if reason else ", in which pruners know no place"),
        expected=f"a composed model, or one of these types: {', '.join(choices)}",
        do="run it without a pruner",
    )
