"""Both towers of a stock CLIP model with fewer tokens: retrieval without a language model (CrossGET).

The towers run apart from each other, so each is guided by a token of its own: the cross token or the class token of
pictures, the end of a text.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import CLIPModel, PreTrainedConfig

from mllm.pruning.attach import occupy
from mllm.pruning.encoder_blocks import block_of
from mllm.pruning.merging_encoder import MergingEncoder, Slots, hidden_at, spread
from mllm.shapes import Bool, Float, Int, Tensor

if TYPE_CHECKING:
    from mllm.pruning.crossget import CrossGet


@contextmanager
def attached_to_towers(model: CLIPModel, pruner: "CrossGet") -> Iterator["CrossGet"]:
    """A context in which both towers merge tokens; see `Pruner.__call__`."""
    with ExitStack() as stack:
        occupy(model, pruner, stack)
        _hold(model.vision_model, _image_tower(model, pruner), stack)
        if pruner.text_r or pruner.cross_tokens is not None:
            texts = _text_tower(model, pruner)
            _hold(model.text_model, texts, stack)
            stack.callback(model.text_model.register_forward_pre_hook(texts.note_ends, with_kwargs=True).remove)
        yield pruner


class MergingTextEncoder(MergingEncoder):
    """The same for CLIP's text encoder: causal, and every row as long as it is, up to its end token.

    The end token is the guide, and never merges; the cross token carries it along. What stands behind it is seen by
    nobody who is asked, and is left out.
    """

    def __init__(self, *args: Any, end_token_id: int, r: Callable[[int], list[int]], **kwargs: Any):
        super().__init__(*args, num_prefix_tokens=0, **kwargs)
        self.end_token_id = end_token_id
        self.r = r
        self.ends: Tensor | None = None
        self.is_text: Tensor | None = None
        self.lengths: list[int] = []

    def note_ends(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """In front of the encoder: where each text ends."""
        ids = args[0] if args else kwargs["input_ids"]
        ids = ids.view(-1, ids.shape[-1])
        self.ends = end_places(ids, self.end_token_id)
        self.is_text = torch.arange(ids.shape[1], device=ids.device) <= self.ends[:, None]
        if (mask := kwargs.get("attention_mask")) is not None:
            self.is_text &= mask.bool()

    def begin(self, hidden: Float[Tensor, "B T D"]) -> Slots:
        """The words of each text."""
        assert self.is_text is not None
        columns = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        self.lengths = self.is_text.sum(dim=1).tolist()
        steps = [self.r(length - 1) for length in self.lengths]
        self.steps = [list(of_layer) for of_layer in zip(*steps, strict=True)]
        return Slots(columns, self.is_text, None, columns)

    def cross_state(self, hidden: Float[Tensor, "B t D"], slots: Slots) -> Float[Tensor, "B D"]:
        """In each layer the end token anew."""
        return hidden_at(hidden, self._end_slots(slots))

    def guide(self, slots: Slots) -> Int[Tensor, " B"]:
        """The end token."""
        return self._end_slots(slots)

    def is_candidate(self, slots: Slots) -> Bool[Tensor, "B t"]:
        """All words but the end."""
        assert self.ends is not None
        return slots.is_token & (slots.columns < self.ends[:, None])

    def mask(self, slots: Slots, given: Tensor | None, hidden: Float[Tensor, "B t D"]) -> Tensor:
        """Who stands before whom, and how much merged tokens count."""
        is_before = slots.columns[:, None, :] <= slots.columns[:, :, None]
        is_seen = is_before & slots.is_token[:, None, :]
        counts = torch.zeros_like(slots.columns, dtype=hidden.dtype)
        if slots.sizes is not None and self.options.proportional:
            counts = slots.sizes.log().to(hidden.dtype)
        # Not infinite, in float32 neither: a slot without a token may see nobody.
        lowest = max(torch.finfo(hidden.dtype).min, torch.finfo(torch.float32).min)
        return counts[:, None, :].expand(is_seen.shape).masked_fill(~is_seen, lowest)[:, None]

    def _width(self, number: int, slots: Slots) -> int:
        self.lengths = [one - step for one, step in zip(self.lengths, self.steps[number], strict=True)]
        return max(self.lengths) + (self.cross_tokens is not None)

    def _end_slots(self, slots: Slots) -> Int[Tensor, " B"]:
        assert self.ends is not None
        return slots.at(self.ends)


def end_places(input_ids: Int[Tensor, "B T"], end_token_id: int) -> Int[Tensor, " B"]:
    """Where the text encoder of CLIP looks for what a text means."""
    if end_token_id == 2:  # what old configurations say, whatever the tokenizer's is: the highest id
        return input_ids.to(torch.int).argmax(dim=-1)
    return (input_ids == end_token_id).int().argmax(dim=-1)


def _image_tower(model: CLIPModel, pruner: "CrossGet") -> MergingEncoder:
    config = model.vision_model.config
    tokens = pruner.image_cross_tokens(config.num_hidden_layers, config.hidden_size, model.device)
    options = pruner.options(config.num_hidden_layers)
    return MergingEncoder(
        list(model.vision_model.encoder.layers),
        block_of("clip_vision_model"),
        num_heads=config.num_attention_heads,
        num_prefix_tokens=1,
        options=options,
        cross_tokens=tokens,
    )


def _text_tower(model: CLIPModel, pruner: "CrossGet") -> MergingTextEncoder:
    config: PreTrainedConfig = model.text_model.config
    num_layers = config.num_hidden_layers
    return MergingTextEncoder(
        list(model.text_model.encoder.layers),
        block_of("clip_text_model"),
        num_heads=config.num_attention_heads,
        options=pruner.options(num_layers),
        cross_tokens=pruner.text_cross_tokens(num_layers, config.hidden_size, model.device),
        end_token_id=config.eos_token_id,
        r=lambda num_words: pruner.text_steps(num_words, num_layers),
    )


def _hold(tower: nn.Module, merging: MergingEncoder, stack: ExitStack) -> None:
    merging.take_hold(stack)
    stack.callback(tower.encoder.register_forward_hook(_spreading(merging)).remove)


def _spreading(merging: MergingEncoder) -> Callable[[nn.Module, tuple, Any], Any]:
    """A hook after which the tokens that are left stand where they stood, and zeros elsewhere."""

    def hook(module: nn.Module, args: tuple, outputs: Any) -> Any:
        hidden = outputs.last_hidden_state
        outputs.last_hidden_state = spread(hidden, merging.last, merging.num_tokens, nothing=0.0)
        return outputs

    return hook
