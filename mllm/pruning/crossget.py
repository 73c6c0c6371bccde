"""CrossGET (arXiv 2305.17455, ICML 2024): tokens merge inside the encoder, by complete-graph soft matching."""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import CLIPModel, PreTrainedModel

from mllm.errors import OptionError
from mllm.pruning.anatomy import Anatomy
from mllm.pruning.base import Item, Pruner, Selection
from mllm.pruning.cross_tokens import ZEROS, load_cross_tokens
from mllm.pruning.encoder_merging import EncoderReading, Merges, merge_in_encoders
from mllm.pruning.first_tokens import FirstTokens
from mllm.pruning.merging_encoder import IMPORTANCES, MergeOptions
from mllm.pruning.removal import steady_steps, steps_to
from mllm.shapes import Tensor


@dataclass
class CrossGet(Pruner):
    """Merges tokens in each layer of the encoder, between its attention and its MLP, guided by a token of the whole.

    The encoder gets cheaper, too. What is left of a picture stands at the places of its patches in front of the
    language model; a Q-Former or a resampler reads fewer features, and gives as many vectors as ever. With cross
    tokens that of the last layer goes along, as the published code has it, at the last place that has become free.

    Here `tokens` counts those of each view: of each picture, or of each frame of a video.

    Args:
        r: How many tokens leave in each layer, in place of `tokens`. The paper takes 13 for LLaVA-1.5.
        text_r: The same for the texts of a `CLIPModel`, whose tower has no other budget; the paper takes 6.
        importance: What makes a token stay: "cosine", how like its key is to the query of the guide, as published for
            CLIP; "attention", what it is paid, as published for LLaVA; "none". The guide is the cross token, or the
            class token; without both, all patches together.
        proportional: Whether merged tokens are attended to as so many as they stand for.
        cross_tokens: Directory of a model that was tuned with cross tokens; "zeros" for tokens that carry the class
            token along and add nothing; None for no such tokens.
    """

    r: int | None = None
    text_r: int = 0
    importance: str = "cosine"
    proportional: bool = True
    cross_tokens: str | None = None
    reading: EncoderReading | None = field(default=None, init=False, repr=False, compare=False)
    """What the encoder of the model at hand gives, while attached and afterwards."""
    first_tokens: FirstTokens | None = field(default=None, init=False, repr=False, compare=False)
    """What the language model at hand adds to first tokens; None where it adds nothing."""
    learned: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """While cross tokens are being learned, those; in place of a directory."""

    def __post_init__(self):
        super().__post_init__()
        self.check("r", self.r is None or self.r >= 1, "1 or more, or None")
        self.check("text_r", self.text_r >= 0, "0 or more")
        self.check("importance", self.importance in IMPORTANCES, f"one of {', '.join(IMPORTANCES)}")

    @property
    def has_cross_tokens(self) -> bool:
        """Whether a token of its own goes through the encoder, and along with what is left."""
        return self.cross_tokens is not None or bool(self.learned)

    def __call__(self, model: PreTrainedModel | PeftModel) -> AbstractContextManager["Pruner"]:
        """A context in which `model` is pruned; a `CLIPModel`, which has no language model, in both its towers.

        Raises:
            OptionError: The model lacks what the method needs, or a pruner is attached to it already.
        """
        if isinstance(model, CLIPModel):
            from mllm.pruning.clip_towers import attached_to_towers  # which knows this class

            return attached_to_towers(model, self)
        return super().__call__(model)

    def take_hold(self, anatomy: Anatomy, stack: ExitStack) -> None:
        """See `Pruner.take_hold`."""
        stack.callback(self._let_go)
        self.reading = merge_in_encoders(anatomy, self, stack)
        self.first_tokens = None
        if self.learned or self.cross_tokens not in (None, ZEROS):
            width = anatomy.body.config.hidden_size
            tokens = self.text_cross_tokens(len(anatomy.layers), width, anatomy.model.device)
            assert tokens is not None
            self.first_tokens = FirstTokens(anatomy, tokens)
            self.first_tokens.take_hold(stack)

    def select(self, item: Item, num_layers: int) -> Selection | None:
        """What is left already; see `Pruner.select`."""
        assert self.reading is not None
        lives_in = self.reading.merges.take(len(item.vectors)) if self.reading.is_expanded else None
        if lives_in is None:
            return None
        is_left = ~item.vectors[:, 0].isnan()
        number = is_left.long().cumsum(0) - 1
        return Selection(is_left.nonzero()[:, 0], merged_into=number[lives_in])

    def counts(self, num_tokens: int, num_layers: int) -> list[int]:
        """See `Pruner.counts`.

        Raises:
            OptionError: With `r`, before the first model, whose number of layers is not known.
        """
        reading = self.reading
        if reading is None and self.r is not None:
            raise OptionError(
                f"r = {self.r}, and no encoder yet",
                expected="a model, whose layers say how many tokens leave",
                do="ask inside of `with pruner(model):`, or set `tokens`",
            )
        if reading is None:
            return super().counts(num_tokens, num_layers)
        if not reading.is_expanded:
            return [num_tokens] * num_layers
        views = num_tokens // reading.num_tokens
        return [views * self._left(reading)] * num_layers

    def steps(self, num_patches: int, num_layers: int, num_prefix: int) -> list[int]:
        """How many patches of a view leave in each of an encoder's layers.

        Args:
            num_patches: Of a view.
            num_layers: That merge.
            num_prefix: Tokens in front of the patches that go to the language model, and count among `tokens`.
        """
        if self.r is not None:
            return steady_steps(num_patches, self.r, num_layers)
        budget = self.budget(num_patches + num_prefix)
        if budget >= num_patches + num_prefix:
            return [0] * num_layers
        others = num_prefix + self.has_cross_tokens
        if budget <= others:
            raise OptionError(
                f"tokens = {self.tokens!r}: {budget} of each view, of which {others} are no patches",
                expected=f"{others + 1} or more",
                do="raise `tokens`",
            )
        return steps_to(num_patches, budget - others, num_layers)

    def text_steps(self, num_words: int, num_layers: int) -> list[int]:
        """How many of so many words leave in each layer of a text encoder."""
        return steady_steps(num_words, self.text_r, num_layers)

    def image_cross_tokens(self, num_layers: int, width: int, device: torch.device) -> Tensor | None:
        """What is added to the cross token in front of each layer of a vision encoder; None without cross tokens."""
        return self._cross_tokens("image", (num_layers, width), device)

    def text_cross_tokens(self, num_layers: int, width: int, device: torch.device) -> Tensor | None:
        """The same for a text encoder, or for the first token of a language model."""
        return self._cross_tokens("text", (num_layers, width), device)

    def _cross_tokens(self, name: str, shape: tuple[int, int], device: torch.device) -> Tensor | None:
        if self.learned:
            return self.learned[name]
        if self.cross_tokens is None:
            return None
        if self.cross_tokens == ZEROS:
            return torch.zeros(shape, device=device)
        return load_cross_tokens(Path(self.cross_tokens), name, shape).to(device)

    def options(self, num_layers: int, num_prefix: int = 0) -> MergeOptions:
        """For an encoder of so many layers; see `steps`."""
        return MergeOptions(
            lambda num_patches: self.steps(num_patches, num_layers, num_prefix), self.importance, self.proportional
        )

    def _let_go(self) -> None:
        """Keep what `counts` asks for, and nothing of the model."""
        self.first_tokens = None
        if self.reading is not None:
            self.reading = replace(self.reading, merges=Merges(), merging=None)

    def _left(self, reading: EncoderReading) -> int:
        """Of the tokens of each view, how many reach the language model."""
        num_patches = reading.num_tokens - reading.num_prefix
        leaving = sum(self.steps(num_patches, reading.num_layers, reading.num_prefix))
        return reading.num_tokens - leaving + (leaving > 0 and self.has_cross_tokens)
