"""Attach a pruner to a model: hooks on the instance, gone afterwards.

Media become vectors as ever. Those that are to leave in front of the language model are marked: their numbers are no
numbers (NaN). So they pass through whatever a model does to vectors on their way (packing tiles, repeating them for
beams, scattering them to their placeholders) without anyone having to know which left, and in front of the language
model they are taken out. In front of each cut's layer more leave. What comes out of the language model stands at its
own column again, so callers, losses and heads see the shapes they expect.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from mllm.errors import OptionError, RowError
from mllm.pruning.anatomy import Anatomy, anatomy_of, items_of_rows
from mllm.pruning.base import Cut, Pruner
from mllm.pruning.caches import check_kind, open_cache, reached_by, remember
from mllm.pruning.features import FeatureStage
from mllm.pruning.forward import Forward
from mllm.pruning.notes import selections_of_rows
from mllm.shapes import Float, Int, Tensor

_ATTACHED = "_mllm_pruner"


@contextmanager
def attached(model: PreTrainedModel | PeftModel, pruner: Pruner) -> Iterator[Pruner]:
    """A context in which `model` is pruned; see `Pruner.__call__`."""
    anatomy = anatomy_of(model)
    with ExitStack() as stack:
        occupy(anatomy.model, pruner, stack)
        Session(anatomy, pruner).take_hold(stack)
        pruner.take_hold(anatomy, stack)  # behind ours: CrossGET's hooks see what has been taken out
        yield pruner


def occupy(model: PreTrainedModel, pruner: Pruner, stack: ExitStack) -> None:
    """Mark a model as one that a pruner is attached to, as long as the stack holds.

    Raises:
        OptionError: One is attached to it already.
    """
    if _ATTACHED in vars(model):
        other = type(vars(model)[_ATTACHED]).__name__
        raise OptionError(
            f"a {type(pruner).__name__} for a model that a {other} is attached to",
            expected="one pruner at a time",
            do="leave the block of the first one before",
        )
    setattr(model, _ATTACHED, pruner)
    stack.callback(delattr, model, _ATTACHED)


class Session:
    """A pruner at work on a model."""

    def __init__(self, anatomy: Anatomy, pruner: Pruner):
        self.anatomy = anatomy
        self.pruner = pruner
        self.cuts = pruner.cuts(len(anatomy.layers))
        _check_cuts(self.cuts, len(anatomy.layers), pruner)
        _check_positions(anatomy)
        self.features = FeatureStage(anatomy, pruner)
        self.input_ids: Int[Tensor, "B T"] | None = None
        self.encoded: dict[str, Any] | None = None
        self.forward: Forward | None = None

    def take_hold(self, stack: ExitStack) -> None:
        """Put the hooks on, and their removal on the stack."""
        body, layers = self.anatomy.body, self.anatomy.layers
        self.features.take_hold(stack)
        for handle in (
            self.anatomy.backbone.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            self.anatomy.backbone.register_forward_hook(self._after_backbone, always_call=True),
            body.register_forward_pre_hook(self._before_body, with_kwargs=True),
            body.register_forward_hook(self._after_body),
        ):
            stack.callback(handle.remove)
        for index in range(self._first_layer_to_see(), len(layers)):
            handle = layers[index].register_forward_pre_hook(self._before_layer(index), with_kwargs=True)
            stack.callback(handle.remove)

    def _first_layer_to_see(self) -> int:
        """From which layer on inputs are others than those that the language model hands over."""
        vision = self.anatomy.model.config.to_dict().get("vision_config") or {}
        has_deep_features = bool(self.cuts) and bool(vision.get("deepstack_visual_indexes"))
        if has_deep_features or self.anatomy.body.config._attn_implementation.startswith("flash"):
            return 0
        return min((cut.scored_at for cut in self.cuts), default=len(self.anatomy.layers))

    def _before_backbone(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.forward = None
        self.input_ids = kwargs.get("input_ids", args[0] if args else None)
        self.encoded = kwargs.get("mm_encoder_outputs")
        chosen = self.features.selections if self.encoded else {}
        self.features.start(self.input_ids)
        self.features.selections = chosen

    def _after_backbone(self, module: nn.Module, args: tuple, outputs: Any) -> None:
        self.input_ids = self.encoded = self.forward = None

    def _before_body(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        self.forward = None
        if embeds is None:
            return None
        layers = (0, *(cut.layer for cut in self.cuts))
        past = reached_by(cache, layers=layers, positions=self.pruner.positions)
        items = self._items(embeds)
        if past is None and not any(items):
            return None
        check_kind(cache)
        self._check(kwargs)
        chosen = selections_of_rows(self._kinds(items), self.features.selections)
        self.forward = Forward(self.anatomy, self.pruner, self.cuts, past=past, items=items, selections=chosen)
        open_cache(cache)
        return args, self.forward.enter(kwargs)

    def _before_layer(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            return None if self.forward is None else self.forward.before_layer(index, module, args, kwargs)

        return hook

    def _after_body(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        forward, self.forward = self.forward, None
        if forward is None:
            return None
        if outputs.past_key_values is not None:
            remember(outputs.past_key_values, forward.reached())
        forward.leave(outputs)
        return outputs

    def _items(self, embeds: Float[Tensor, "B T D"]) -> list[list[Int[Tensor, " _"]]]:
        """The columns of the visual items of each row."""
        lengths = self.features.lengths_of(self.encoded)
        if self.input_ids is None:
            _check_unmarked(embeds)
            return [[] for _ in embeds]
        expected = {modality: sum(lengths.get(modality, ())) for modality in self.anatomy.placeholders}
        if not any(expected.values()):
            return [[] for _ in embeds]  # without media, a placeholder that a model happens to speak is a word
        marks = {modality: self.input_ids == token for modality, token in self.anatomy.placeholders.items()}
        found = {modality: int(mark.sum()) for modality, mark in marks.items()}
        if not any(found.values()):
            return [[] for _ in embeds]  # encoded along with those of other ranks
        if found != expected:
            raise RowError(
                f"a forward with so many visual tokens: {found}, of items with {expected}",
                expected="all tokens of each picture and video in one forward",
                do="do not prefill in chunks under a pruner",
            )
        return items_of_rows(marks, lengths)

    def _kinds(self, items: list[list[Int[Tensor, " _"]]]) -> list[list[str]]:
        """Of which modality the visual items of each row are."""
        names = {token: modality for modality, token in self.anatomy.placeholders.items()}
        ids = self.input_ids
        if ids is None:
            return [[] for _ in items]
        return [[names[int(ids[row, own[0]])] for own in of_row] for row, of_row in enumerate(items)]

    def _check(self, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() != 2):
            raise OptionError(
                "an attention mask of pairs of tokens, under a pruner",
                expected="a mask of tokens [B, T], or none",
                do="leave the pairs to the model",
            )
        if kwargs.get("output_attentions"):
            raise OptionError(
                "output_attentions, under a pruner",
                expected="no attention weights: they would be of other tokens in each layer",
                do="ask for them without a pruner",
            )
        if self.cuts and self.anatomy.body.training:
            raise OptionError(
                f"{type(self.pruner).__name__}, which cuts between layers, on a model that is being trained",
                expected="a model in eval mode",
                do="train with a pruner that works in front of the language model, or call `model.eval()`",
            )
        is_packed = kwargs.get("segment_lengths") is not None
        if self.cuts and is_packed:
            raise OptionError(
                f"packed rows under {type(self.pruner).__name__}, which cuts between layers",
                expected="padded rows",
                do="batch with padding",
            )
        positions = kwargs.get("position_ids")
        is_plain = is_packed or mask is not None or positions is None or positions.shape[-1] == 1
        if not is_plain and bool((positions.diff(dim=-1) < 0).any()):
            raise OptionError(
                "rows whose positions begin anew, under a pruner, without `segment_lengths`",
                expected="packed rows as mllm's collator makes them, or padded ones",
                do="make batches with mllm.data.collate.PackingCollator, or with padding",
            )
        if self.pruner.positions == "compacted" and positions is not None and positions.dim() != 2:
            raise OptionError(
                "positions: compacted, for a model whose tokens have several positions each (M-RoPE)",
                expected="positions: original",
                do="set `positions` to original",
            )


def _check_cuts(cuts: tuple[Cut, ...], num_layers: int, pruner: Pruner) -> None:
    before = -1
    for cut in cuts:
        if not before < cut.layer < num_layers or not max(before, cut.layer - 1, 0) <= cut.scored_at <= cut.layer:
            raise OptionError(
                f"{type(pruner).__name__}: cuts in front of layers {[cut.layer for cut in cuts]}, of {num_layers}",
                expected=f"ascending ones below {num_layers}, each decided by its layer or the one before",
                do="choose layers that the language model has",
            )
        before = cut.layer


def _check_positions(anatomy: Anatomy) -> None:
    has_alibi = bool(anatomy.body.config.to_dict().get("alibi"))  # of Falcon, an option
    if has_alibi or "position_ids" not in inspect.signature(anatomy.body.forward).parameters:
        raise OptionError(
            f"a {type(anatomy.body).__name__}, which takes no positions (it tells distances by its mask)",
            expected="a language model whose tokens can keep their positions when others leave",
            do="run it without a pruner",
        )


def _check_unmarked(embeds: Float[Tensor, "B T D"]) -> None:
    if bool(embeds[..., 0].isnan().any()):
        raise RowError(
            "embedded inputs with media in them, under a pruner, and no `input_ids` that say where",
            expected="input_ids, and the media beside them",
            do="let the model put media into texts, or encode them outside of the pruner's block",
        )
