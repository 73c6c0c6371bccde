"""Tokens merge in the encoders of a model with a language model; what reads their features learns which are left."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mllm.errors import OptionError
from mllm.models.connectors import Connector
from mllm.models.encoders import ENCODERS
from mllm.models.modeling import MllmTower
from mllm.models.parts import layers_of, parts_of
from mllm.pruning.anatomy import Anatomy
from mllm.pruning.encoder_blocks import block_of
from mllm.pruning.merging_encoder import MergingEncoder, spread
from mllm.shapes import Float, Int, Tensor
from mllm.sizes import ImageTokenRule

if TYPE_CHECKING:
    from mllm.pruning.crossget import CrossGet

UNSUPPORTED_STOCK = {
    "llava_next": "parts of its tiles are padding that is cut off behind the connector, so that how many tokens are "
    "left would depend on the picture",
    "llava_onevision": "it interpolates grids of vectors and pools those of frames, so that none may be missing",
    "internvl": "its connector joins neighbouring patches, so that none may be missing",
    "smolvlm": "its connector joins neighbouring patches, so that none may be missing",
    "idefics3": "its connector joins neighbouring patches, so that none may be missing",
    "qwen2_5_vl": "its encoder attends within windows of patches and joins neighbours, so that none may be missing",
    "qwen3_vl": "its encoder joins neighbouring patches, so that none may be missing",
}
"""Stock models whose encoders cannot be left with fewer tokens, and why."""


@dataclass(frozen=True)
class EncoderReading:
    """What an encoder gives to a language model.

    Args:
        num_tokens: Of each view, before any leave.
        num_prefix: How many of them stand in front of the patches.
        num_layers: Layers of the encoder that merge.
        is_expanded: Whether each is a token of the language model; else a connector reads them, however many.
        merges: What has become of the tokens of each view.
        merging: The encoder's forward; None once the model is let go.
    """

    num_tokens: int
    num_prefix: int
    num_layers: int
    is_expanded: bool
    merges: "Merges"
    merging: MergingEncoder | None


class Merges:
    """Where the tokens of views live on, from the encoder that sees the views to the pruner that is asked of items."""

    def __init__(self):
        self.views: list[Int[Tensor, " V"]] = []
        self.is_used = False

    def add(self, lives_in: Int[Tensor, "B V"]) -> None:
        """Of the views of a call of the encoder, for each token that of the view in which it lives on."""
        if self.is_used:  # those of media before
            self.views, self.is_used = [], False
        self.views += list(lives_in)

    def take(self, num_tokens: int) -> Int[Tensor, " V"] | None:
        """Of the next item, which has so many tokens in all of its views; None where that is not known."""
        self.is_used, taken, first = True, [], 0
        while self.views and first < num_tokens:
            taken.append(self.views.pop(0) + first)
            first += len(taken[-1])
        return torch.cat(taken) if taken and first == num_tokens else None


def merge_in_encoders(anatomy: Anatomy, pruner: "CrossGet", stack: ExitStack) -> EncoderReading:
    """Let the tokens of pictures and frames merge on their way.

    Returns:
        What the encoder of images gives, or where there is none that of videos.

    Raises:
        OptionError: The model needs all of its patches, or its encoder is not known.
    """
    if not anatomy.is_composed:
        return _in_stock(anatomy, pruner, stack)
    towers = {name: tower for name, tower in anatomy.backbone.towers.items() if name in ("image", "video")}
    readings = [
        _in_tower(anatomy, name, tower, pruner, stack) for name, tower in towers.items() if tower.encoder is not None
    ]
    for tower in towers.values():
        _read_what_is_left(tower, stack)
    return readings[0]


def _in_tower(anatomy: Anatomy, name: str, tower: MllmTower, pruner: "CrossGet", stack: ExitStack) -> EncoderReading:
    rule, config = tower.rule, tower.config
    if isinstance(rule, ImageTokenRule) and rule.tiles is not None:
        raise _unsupported("a model of ours that cuts pictures into tiles", UNSUPPORTED_STOCK["llava_next"])
    kind = tower.connector.length_rule.kind
    if kind not in ("each", "fixed"):
        reason = "it joins neighbouring patches, so that none may be missing"
        raise _unsupported(f"a {config.connector['type']} connector", reason)
    encoder = config.encoder_config
    feature_layer = config.feature_layer % (encoder.num_hidden_layers + 1)
    names = layers_of(anatomy.model, parts_of(anatomy.model)[f"{name}.encoder"])[:feature_layer]
    num_tokens = rule.views((1, 1))[0] if isinstance(rule, ImageTokenRule) else rule.features
    merging = _merging(anatomy, encoder, names, rule.num_dropped, pruner, stack)
    merges = Merges()
    hook = _expanding(merging, feature_layer, rule.num_dropped, merges)
    stack.callback(tower.encoder.register_forward_hook(hook).remove)
    num_kept = merging.num_prefix_tokens - rule.num_dropped
    return EncoderReading(num_tokens, num_kept, len(names), kind == "each", merges, merging)


def _in_stock(anatomy: Anatomy, pruner: "CrossGet", stack: ExitStack) -> EncoderReading:
    config = anatomy.model.config
    if config.model_type in UNSUPPORTED_STOCK:
        raise _unsupported(f"a model of type {config.model_type!r}", UNSUPPORTED_STOCK[config.model_type])
    vision, layer = config.vision_config, config.vision_feature_layer
    if not isinstance(layer, int):
        raise _unsupported("features of several layers", "in each of them other tokens are left")
    feature_layer = layer % (vision.num_hidden_layers + 1)
    names = layers_of(anatomy.model, parts_of(anatomy.model)["image.encoder"])[:feature_layer]
    num_dropped = int(config.vision_feature_select_strategy == "default")
    merging = _merging(anatomy, vision, names, num_dropped, pruner, stack)
    merges = Merges()
    hook = _expanding(merging, feature_layer, num_dropped, merges)
    stack.callback(anatomy.backbone.vision_tower.register_forward_hook(hook).remove)
    projector = anatomy.backbone.multi_modal_projector
    projector.forward = partial(_project_what_is_left, projector.forward)
    stack.callback(delattr, projector, "forward")
    num_kept = merging.num_prefix_tokens - num_dropped
    num_patches = (vision.image_size // vision.patch_size) ** 2
    return EncoderReading(
        num_patches + num_kept, num_kept, len(names), is_expanded=True, merges=merges, merging=merging
    )


def _merging(
    anatomy: Anatomy, encoder: Any, names: list[str], num_dropped: int, pruner: "CrossGet", stack: ExitStack
) -> MergingEncoder:
    block = block_of(encoder.model_type)
    num_prefix = ENCODERS[encoder.model_type].num_prefix_tokens(encoder)
    merging = MergingEncoder(
        [anatomy.model.get_submodule(name) for name in names],
        block,
        num_heads=encoder.num_attention_heads,
        num_prefix_tokens=num_prefix,
        options=pruner.options(len(names), num_prefix - num_dropped),
        cross_tokens=pruner.image_cross_tokens(len(names), encoder.hidden_size, anatomy.model.device),
    )
    merging.take_hold(stack)
    return merging


def _expanding(
    merging: MergingEncoder, feature_layer: int, num_dropped: int, merges: Merges
) -> Callable[[nn.Module, tuple, Any], Any]:
    """A hook after which the features are as many as ever; those of patches that have left are no numbers (NaN)."""

    def hook(module: nn.Module, args: tuple, outputs: Any) -> Any:
        states = list(outputs.hidden_states)
        states[feature_layer], lives_in = expanded(states[feature_layer], merging)
        outputs.hidden_states = tuple(states)
        merges.add(lives_in[:, num_dropped:] - num_dropped)
        return outputs

    return hook


def expanded(
    hidden: Float[Tensor, "B t D"], merging: MergingEncoder
) -> tuple[Float[Tensor, "B T D"], Int[Tensor, "B T"]]:
    """The encoder's own tokens at their places, the cross token at the last that has become free, NaN elsewhere.

    And at which place each lives on.
    """
    slots, num_tokens = merging.last, merging.num_tokens
    full = spread(hidden, slots, num_tokens, nothing=float("nan"))
    if merging.cross_tokens is None:
        return full, slots.lives_in
    places = torch.arange(num_tokens, device=hidden.device)
    is_free = slots.lives_in != places
    last = num_tokens - 1 - is_free.flip(1).int().argmax(dim=1)
    is_place = (places == last[:, None]) & is_free
    cross = merging.cross_state(hidden, slots)[:, None]
    return torch.where(is_place[..., None], cross, full), torch.where(is_place, places, slots.lives_in)


def _read_what_is_left(tower: MllmTower, stack: ExitStack) -> None:
    """Let a tower's connectors leave out what is no number."""
    for module in tower.connector.modules():
        if isinstance(module, Connector):
            own = module.connect
            connect = partial(_connect_each if module.length_rule.kind == "each" else _connect_left, own)
            module.connect = connect  # type: ignore[method-assign]
            stack.callback(delattr, module, "connect")


def _connect_each(own: Callable, features: Float[Tensor, "N L D"], lengths: Any, question: Any) -> Tensor:
    return _project_what_is_left(lambda left: own(left, None, question), features)


def _project_what_is_left(own: Callable, features: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D_out"]:
    """What a connector makes of the features that are left, each by itself, at their places."""
    is_left = ~features[..., 0].isnan()
    if bool(is_left.all()):
        return own(features)
    vectors = own(features[is_left][None])[0]
    nothing = vectors.new_full((*is_left.shape, vectors.shape[-1]), float("nan"))
    return nothing.index_put((is_left,), vectors)


def _connect_left(
    own: Callable, features: Float[Tensor, "N L D"], lengths: Int[Tensor, " N"] | None, question: Any
) -> Float[Tensor, "N V D_out"]:
    """What a connector that reads sequences makes of the features that are left, in their order."""
    is_left = ~features[..., 0].isnan()
    if bool(is_left.all()):
        return own(features, lengths, question)
    if lengths is not None:
        is_left &= torch.arange(features.shape[1], device=features.device) < lengths[:, None]
    counts = is_left.sum(dim=1)
    longest = int(counts.max())
    order = is_left.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    # What stands behind a shorter sequence's own does not count, and is a number.
    left = features.masked_fill(~is_left[..., None], 0.0).gather(
        1, order[..., None].expand(-1, -1, features.shape[-1])
    )
    return own(left, None if bool((counts == longest).all()) else counts, question)


def _unsupported(found: str, reason: str) -> OptionError:
    return OptionError(
        f"{found}, for a pruner that merges tokens inside of encoders: {reason}",
        expected="LLaVA-1.5, or a model of ours whose connector is pointwise (linear, mlp) or reads any number of "
        "features (qformer, perceiver)",
        do="choose another pruner (visiondrop, divprune, tome, uniform)",
    )
