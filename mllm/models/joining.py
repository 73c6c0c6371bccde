"""Stock models whose ranks have to meet: a rank without media encodes a blank medium, at the place of real ones."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mllm.models.ranks import is_called_together
from mllm.shapes import Float, Tensor


def _encode_sound(backbone: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Any:
    """Qwen2-Audio has no function for it; the mask of silence leaves nothing out."""
    return backbone.multi_modal_projector(backbone.audio_tower(inputs["input_features"]).last_hidden_state)


_ENCODE: dict[str, Callable[[PreTrainedModel, Mapping[str, Tensor]], Any]] = {"qwen2_audio": _encode_sound}
"""How media are encoded and connected, by model type, where it is not `get_image_features`."""
_INNER = ("last_hidden_state", "hidden_states", "attentions")
"""What such a function gives besides features, layers among it that nothing is made of."""


@contextmanager
def joining_ranks(backbone: PreTrainedModel, blank: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a forward of the backbone without media encodes the blank one, if other ranks may be encoding theirs.

    It changes no number: zero times its features is added to the embedded text. It is encoded when the language model
    is called, as real media are: ZeRO-3 compares the modules that each rank calls, one by one.

    Args:
        backbone: A stock model without its head.
        blank: One blank medium, as the model's processor gives it.
        inputs: Of the forward.
    """
    decoder = backbone.get_decoder()
    if not blank or any(name in inputs for name in blank) or not _are_called_together(backbone, decoder):
        yield
        return

    def add_nothing(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        encode = _ENCODE.get(backbone.config.model_type, _encode_image)
        features = encode(backbone, {name: tensor.to(backbone.device) for name, tensor in blank.items()})
        return args, kwargs | {"inputs_embeds": kwargs["inputs_embeds"] + _zero_of(features)}

    handle = decoder.register_forward_pre_hook(add_nothing, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _are_called_together(backbone: PreTrainedModel, decoder: nn.Module) -> bool:
    """Whether the ranks have to call what stands beside the language model equally often."""
    others = [module for module in backbone.children() if module is not decoder]
    return any(is_called_together(module, training=backbone.training) for module in others)


def _encode_image(backbone: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Any:
    return backbone.get_image_features(**inputs)


def _zero_of(features: Any) -> Float[Tensor, ""] | float:
    """Zero, and behind it everything that a tower gives to the language model."""
    if torch.is_tensor(features):
        return 0.0 * features.nansum()  # what a pruner has marked is no number
    if isinstance(features, Mapping):
        features = [value for name, value in features.items() if name not in _INNER]
    return sum((_zero_of(one) for one in features if one is not None), 0.0)
