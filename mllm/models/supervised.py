"""The training loss of stock models: their backbone, then the head at supervised positions only.

A stock forward makes logits of all positions, hands `num_items_in_batch` down to layers that take it for something
else, or (its class says `accepts_loss_kwargs = False`) ignores it. So while a model is trained it has a forward of its
own, put on the instance. It stands inside of whatever wraps the model later (DDP, DeepSpeed, FSDP, PEFT), whose hooks
see backbone and head being called as ever.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from mllm.errors import OptionError, RowError
from mllm.models.joining import joining_ranks
from mllm.models.log_probs import supervised_log_probs
from mllm.models.loss import LogitExtras, supervised_loss
from mllm.models.modeling import MllmForConditionalGeneration
from mllm.models.shared_images import GRIDS, Connected, images_at

_PLAIN = (
    "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm",
    "gemma3", "mistral3", "aya_vision", "cohere2_vision", "vipllava", "lfm2_vl", "qwen2_audio",
)  # fmt: skip
"""Model types whose forward gives what `lm_head` makes of the last hidden states of `model`, and nothing else.

Also where the language model alone would scale or cap its logits: LLaVA-NeXT with a Granite, Cohere 2 Vision, Gemma 3.
"""

LOGIT_EXTRAS: dict[str, Callable[[PreTrainedConfig], LogitExtras]] = {
    **dict.fromkeys(_PLAIN, lambda text: LogitExtras()),
    "paligemma": lambda text: LogitExtras(soft_cap=getattr(text, "final_logit_softcapping", None)),  # Gemma 2 or 1
    "granite4_vision": lambda text: LogitExtras(scale=1.0 / text.logits_scaling),
    "cohere_compass": lambda text: LogitExtras(scale=1.0 if text.logit_scale is None else text.logit_scale),
}
"""What each stock class does to its logits, by model type, from the config of its language model.

Read in the forward of each `*ForConditionalGeneration` in transformers 5.23; tests/models/test_supervised.py compares
every entry with the loss of the class itself.
"""

_MARK = "_is_supervised"


@dataclass
class SupervisedOutput(ModelOutput):
    """What the forward of a stock model returns for labels; see `mllm.models.loss.SupervisedLoss`.

    With `returns_log_probs`, in place of the loss, `log_probs`, and the `encoder_features` of frozen image parts.
    """

    loss: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    encoder_features: dict[str, Any] | None = None


SHARES_IMAGES = ("llava", "llava_next", "llava_onevision", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types whose `get_image_features` gives features by the image, which can be put at several places each.

InternVL gives them by the tile, Idefics3 and SmolVLM by the row.
"""


def takes_shared_media(model: torch.nn.Module) -> bool:
    """Whether a model takes `{kind}_places`: a medium once that stands at several places of the texts."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return isinstance(plain, MllmForConditionalGeneration) or plain.config.model_type in SHARES_IMAGES


def attach_supervised_forward(
    model: PreTrainedModel | PeftModel, *, blank: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Give a stock model a forward that computes `supervised_loss` of labels; without labels it is the stock one.

    It takes `loss_weights` and `num_items_in_batch` as our own model does, which already has such a forward.

    Args:
        model: Any of `LOGIT_EXTRAS`, or ours; under PEFT the model inside. Not yet wrapped by a trainer.
        blank: One blank medium as the model's processor gives it, see `mllm.models.joining`; needed on several ranks.

    Raises:
        OptionError: It is not known what the class does to its logits.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(plain, MllmForConditionalGeneration) or is_supervised(plain):
        return
    model_type = plain.config.model_type
    if model_type not in LOGIT_EXTRAS:
        raise OptionError(
            f"a model of type {model_type!r}",
            expected=f"ours, or one of {', '.join(LOGIT_EXTRAS)}",
            do="choose another model, or add what its forward does to its logits to mllm/models/supervised.py",
        )
    extras = LOGIT_EXTRAS[model_type](plain.config.get_text_config())
    plain.forward = MethodType(_forward_of(plain, extras, blank or {}), plain)


def detach_supervised_forward(model: PreTrainedModel | PeftModel) -> None:
    """Give a stock model its class's forward back, if it has another."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if is_supervised(plain):
        del plain.forward


def is_supervised(model: PreTrainedModel) -> bool:
    """Whether a stock model has the forward of `attach_supervised_forward` at present."""
    return getattr(model.__dict__.get("forward"), _MARK, False)


def _forward_of(
    model: PreTrainedModel, extras: LogitExtras, blank: Mapping[str, torch.Tensor]
) -> Callable[..., ModelOutput]:
    stock = model.forward

    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        returns_log_probs: bool = False,
        own_tokens: torch.Tensor | None = None,
        image_places: torch.Tensor | None = None,
        connected_images: Connected | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        if labels is None:
            return stock(*args, **inputs)
        shown = images_at(self.model, places=image_places, grids=inputs.get(GRIDS), connected=connected_images)
        with joining_ranks(self.model, blank, inputs), shown as images:
            hidden = self.model(*args, **(inputs | images.inputs)).last_hidden_state
        if hidden.shape[:2] != labels.shape:
            raise RowError(
                f"{labels.shape[1]} labels for {hidden.shape[1]} positions",
                expected="one placeholder in the text for every feature vector",
                do="prepare the rows with the processor that belongs to the model",
            )
        if returns_log_probs:
            found = supervised_log_probs(
                hidden, labels, self.get_output_embeddings(), own_tokens=own_tokens, extras=extras
            )
            return SupervisedOutput(log_probs=found, encoder_features=images.to_share())
        return SupervisedOutput(
            *supervised_loss(
                hidden,
                labels,
                self.get_output_embeddings(),
                loss_weights=loss_weights,
                num_items=num_items_in_batch,
                extras=extras,
            )
        )

    # `generate` looks up in the signature which inputs a forward takes. (Not functools.wraps: accelerate follows
    # `__wrapped__` to the end when it takes its own wrapper off, and would put the stock forward in place of ours.)
    vars(forward).update({"__signature__": inspect.signature(type(model).forward), _MARK: True})
    return forward
