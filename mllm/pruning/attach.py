"""Attach a pruner to a model: hooks on the instance, gone afterwards.

Media become vectors as ever. Those that are to leave in front of the language model are marked: their numbers are no
numbers (NaN). So they pass through whatever a model does to vectors on their way (packing tiles, repeating them for
beams, scattering them to their placeholders) without anyone having to know which left, and in front of the language
model they are taken out. In front of each cut's layer more leave. What comes out of the language model stands at its
own column again, so callers, losses and heads see the shapes they expect.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from mllm.errors import OptionError, RowError
from mllm.pruning.anatomy import Anatomy, anatomy_of, items_of_rows
from mllm.pruning.base import Pruner
from mllm.pruning.caches import CacheBook
from mllm.pruning.features import FeatureStage
from mllm.pruning.forward import Forward
from mllm.shapes import Int, Tensor

_ATTACHED = "_mllm_pruner"


@contextmanager
def attached(model: PreTrainedModel | PeftModel, pruner: Pruner) -> Iterator[Pruner]:
    """A context in which `model` is pruned; see `Pruner.__call__`."""
    anatomy = anatomy_of(model)
    if _ATTACHED in vars(anatomy.model):
        other = type(vars(anatomy.model)[_ATTACHED]).__name__
        raise OptionError(
            f"a {type(pruner).__name__} for a model that a {other} is attached to",
            expected="one pruner at a time",
            do="leave the block of the first one before",
        )
    session = Session(anatomy, pruner)
    with ExitStack() as stack:
        session.take_hold(stack)
        setattr(anatomy.model, _ATTACHED, pruner)
        stack.callback(delattr, anatomy.model, _ATTACHED)
        yield pruner


class Session:
    """A pruner at work on a model."""

    def __init__(self, anatomy: Anatomy, pruner: Pruner):
        self.anatomy = anatomy
        self.pruner = pruner
        self.cuts = pruner.cuts(len(anatomy.layers))
        self.features = FeatureStage(anatomy, pruner)
        self.caches = CacheBook()
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
        for index in range(min((cut.scored_at for cut in self.cuts), default=len(layers)), len(layers)):
            handle = layers[index].register_forward_pre_hook(self._before_layer(index), with_kwargs=True)
            stack.callback(handle.remove)

    def _before_backbone(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.forward = None
        self.input_ids = kwargs.get("input_ids", args[0] if args else None)
        self.encoded = kwargs.get("mm_encoder_outputs")

    def _after_backbone(self, module: nn.Module, args: tuple, outputs: Any) -> None:
        self.input_ids = self.encoded = self.forward = None

    def _before_body(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        self.forward = None
        if embeds is None or self.input_ids is None:
            return None
        items = self._items()
        past = self.caches.stages_of(cache)
        if past is None and not any(items):
            return None
        self._check(kwargs)
        self.forward = Forward(self.anatomy, self.pruner, self.cuts, past=past)
        return args, self.forward.enter(kwargs, items)

    def _before_layer(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            return None if self.forward is None else self.forward.before_layer(index, args, kwargs)

        return hook

    def _after_body(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        forward, self.forward = self.forward, None
        if forward is None:
            return None
        if outputs.past_key_values is not None:
            self.caches.keep(outputs.past_key_values, forward.reached())
        outputs.last_hidden_state = forward.leave(outputs.last_hidden_state)
        return outputs

    def _items(self) -> list[list[Int[Tensor, " _"]]]:
        """The columns of the visual items of each row."""
        assert self.input_ids is not None
        marks = {modality: self.input_ids == token for modality, token in self.anatomy.placeholders.items()}
        lengths = self.features.lengths_of(self.encoded)
        found = {modality: int(mark.sum()) for modality, mark in marks.items()}
        expected = {modality: sum(lengths.get(modality, ())) for modality in marks}
        if any(found.values()) and found != expected:
            raise RowError(
                f"a forward with so many visual tokens: {found}, of items with {expected}",
                expected="all tokens of each picture and video in one forward",
                do="do not prefill in chunks under a pruner",
            )
        return items_of_rows(marks, lengths)

    def _check(self, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() != 2):
            raise OptionError(
                "an attention mask of pairs of tokens, under a pruner",
                expected="a mask of tokens [B, T], or none",
                do="leave the pairs to the model",
            )
        if self.cuts and self.anatomy.body.training:
            raise OptionError(
                f"{type(self.pruner).__name__}, which cuts between layers, on a model that is being trained",
                expected="a model in eval mode",
                do="train with a pruner that works in front of the language model, or call `model.eval()`",
            )
        if self.cuts and kwargs.get("segment_lengths") is not None:
            raise OptionError(
                f"packed rows under {type(self.pruner).__name__}, which cuts between layers",
                expected="padded rows",
                do="batch with padding",
            )
