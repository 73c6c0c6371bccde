"""Learns the cross tokens of CrossGET (arXiv 2305.17455) while a model is fine-tuned with fewer visual tokens."""

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from mllm.errors import OptionError
from mllm.pruning import CrossGet
from mllm.pruning.anatomy import Anatomy, anatomy_of
from mllm.pruning.cross_tokens import KL, PARAMETER, alignment_loss, load_cross_tokens
from mllm.shapes import Float, Int, Tensor, TokenIds
from mllm.training.options import SftArguments


@dataclass(frozen=True)
class CrossTokenOptions:
    """How cross tokens are learned.

    Args:
        tokens: As of `CrossGet`, like those below.
        r: How many tokens leave in each layer of the encoder, in place of `tokens`.
        importance: What makes a token stay.
        proportional: Whether merged tokens are attended to as so many.
        positions: "original" or "compacted".
        weight: Of the alignment loss beside that of the answers; the paper's for 7B is 0.001, for 13B 0.1.
        kl: See `alignment_loss`: "reversed" as the published code has it, or "usual".
    """

    tokens: int | float = 64
    r: int | None = None
    importance: str = "cosine"
    proportional: bool = True
    positions: str = "original"
    weight: float = 0.001
    kl: str = "reversed"

    def pruner(self) -> CrossGet:
        """The pruner that the model is trained under.

        Raises:
            OptionError: A value that an option cannot have.
        """
        return CrossGet(self.tokens, self.positions, self.r, 0, self.importance, self.proportional)


def read_cross_tokens(written: Any, where: str) -> CrossTokenOptions | None:
    """The options in a YAML file; None for no cross tokens.

    Raises:
        OptionError: An unknown option, or a value that one cannot have.
    """
    if written is None:
        return None
    known = [option.name for option in dataclasses.fields(CrossTokenOptions)]
    if not isinstance(written, Mapping) or set(written) - set(known):
        raise OptionError(
            f"cross_tokens = {written!r} in {where}",
            expected=f"a mapping with some of {', '.join(known)}",
            do="write for example `cross_tokens: {r: 13}`",
        )
    options = CrossTokenOptions(**written)
    if options.kl not in KL or options.weight < 0:
        raise OptionError(
            f"cross_tokens: kl = {options.kl!r}, weight = {options.weight!r} in {where}",
            expected=f"kl: one of {', '.join(KL)}; weight: 0 or more",
            do="correct it",
        )
    options.pruner()
    return options


def check_cross_tokens(args: SftArguments, where: str) -> None:
    """Cross tokens go together with the other options.

    Raises:
        OptionError: They do not.
    """
    if args.cross_tokens is None:
        return
    reasons = {
        "a preference training": type(args) is not SftArguments,
        "feature_cache: what the encoder gives changes with its cross tokens": args.feature_cache is not None,
        "encoder_chunk: all media of a batch have to be read in one call": args.encoder_chunk is not None,
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise OptionError(
                f"cross_tokens in {where}, and {reason}", expected="one of them", do="remove one of the two"
            )


class CrossTokenTuning:
    """A model with cross tokens to be learned, which stays pruned as long as it is trained.

    The tokens are parameters of the encoder and of the language model, beginning at zero, and are trained at the rates
    of these parts, frozen or not. They are saved apart from the weights; see `mllm.training.checkpoint`. An encoder
    that is otherwise frozen is in training mode, so its dropout, where it has any, is alive.

    Args:
        model: With its modes applied, not yet wrapped by a trainer.
        options: How they are learned.

    Raises:
        OptionError: The model cannot be tuned like that.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, options: CrossTokenOptions):
        self.options = options
        self.pruner = options.pruner()
        self.anatomy = anatomy_of(model)
        _check_model(self.anatomy)
        encoder, body = _encoder(self.anatomy), self.anatomy.body
        self.num_text_layers = len(self.anatomy.layers)
        # How many layers of the encoder count is known when a pruner is attached.
        with CrossGet(self.options.tokens, r=self.options.r)(model) as probe:
            assert isinstance(probe, CrossGet) and probe.reading is not None
            if not probe.reading.is_expanded and options.weight:
                raise _without_projection()
            num_layers = probe.reading.num_layers
        self.tokens = {
            "image": _learned(encoder, num_layers, encoder.config.hidden_size),
            "text": _learned(body, self.num_text_layers, body.config.hidden_size),
        }
        self.pruner.learned = self.tokens
        self.stack = ExitStack()
        self.stack.enter_context(self.pruner(model))

    def read(self, directory: Path) -> None:
        """Go on from the tokens of a checkpoint."""
        for name, parameter in self.tokens.items():
            parameter.data.copy_(load_cross_tokens(directory, name, tuple(parameter.shape)))

    def loss(self, inputs: Mapping[str, Any]) -> Float[Tensor, ""]:
        """The alignment of pictures and texts in the forward that has just been; zero where no row has a picture."""
        reading = self.pruner.reading
        assert self.pruner.first_tokens is not None and reading is not None and reading.merging is not None
        texts = torch.stack([self.pruner.first_tokens.carried[layer] for layer in range(self.num_text_layers)])
        zero = 0.0 * (texts.sum() + self.tokens["image"].sum())
        token = self.anatomy.placeholders.get("image")
        if token is None or not self.options.weight:
            return zero
        views = views_of_rows(inputs["input_ids"], token, inputs.get("segment_lengths"))
        views = views // reading.num_tokens
        if not bool(views.any()):
            return zero
        carried = torch.stack(reading.merging.carried)[:, : int(views.sum())]
        pictures = self._projected(means_of_rows(carried, views))
        repeats = layer_repeats(len(pictures), self.num_text_layers).to(pictures.device)
        pictures = pictures.repeat_interleave(repeats, dim=0)
        texts = texts[:, views > 0]
        aligned = alignment_loss(pictures.flatten(0, 1).float(), texts.flatten(0, 1).float(), kl=self.options.kl)
        return self.options.weight * aligned + zero

    def _projected(self, tokens: Float[Tensor, "layers n D_image"]) -> Float[Tensor, "layers n D_text"]:
        """Through the connector, which learns nothing from it."""
        backbone = self.anatomy.backbone
        connector: nn.Module = (
            backbone.multi_modal_projector if not self.anatomy.is_composed else (backbone.towers["image"].connector)
        )
        frozen = {name: parameter.detach() for name, parameter in connector.named_parameters()}
        flat = functional_call(connector, frozen, (tokens.flatten(0, 1)[None],))[0]
        return flat.unflatten(0, tokens.shape[:2])


def layer_repeats(num_image_layers: int, num_text_layers: int) -> Int[Tensor, " layers"]:
    """How many layers of a language model each layer of an encoder is aligned with, in order."""
    ends = torch.arange(num_image_layers + 1) * num_text_layers // num_image_layers
    return ends.diff()


def views_of_rows(input_ids: TokenIds, token: int, segment_lengths: tuple[int, ...] | None) -> Int[Tensor, " rows"]:
    """How many placeholders each row has; of a packed row each segment."""
    marks = (input_ids == token).long()
    if segment_lengths is None:
        return marks.sum(dim=1)
    return torch.stack([segment.sum() for segment in marks[0].split(list(segment_lengths))])


def means_of_rows(
    carried: Float[Tensor, "layers views D"], views: Int[Tensor, " rows"]
) -> Float[Tensor, "layers _ D"]:
    """Of each row with pictures, the mean over them."""
    rows = torch.repeat_interleave(torch.arange(len(views), device=views.device), views)
    sums = carried.new_zeros(len(carried), len(views), carried.shape[-1]).index_add(1, rows, carried)
    return (sums / views.clamp(min=1)[:, None].to(sums.dtype))[:, views > 0]


def _learned(module: nn.Module, num_layers: int, width: int) -> nn.Parameter:
    like = next(module.parameters())
    parameter = nn.Parameter(torch.zeros(num_layers, width, dtype=like.dtype, device=like.device))
    module.register_parameter(PARAMETER, parameter)
    return parameter


def _encoder(anatomy: Anatomy) -> nn.Module:
    return anatomy.backbone.towers["image"].encoder if anatomy.is_composed else anatomy.backbone.vision_tower


def _check_model(anatomy: Anatomy) -> None:
    if is_deepspeed_zero3_enabled():
        raise OptionError("cross_tokens, under ZeRO-3", expected="ZeRO-2, DDP or one process", do="use zero2.yaml")
    if anatomy.is_composed and "image" not in anatomy.backbone.towers:
        raise OptionError("cross_tokens, and no image tower", expected="a model that sees pictures", do="remove it")


def _without_projection() -> OptionError:
    return OptionError(
        "cross_tokens with an alignment loss, and a connector that reads sequences",
        expected="a connector that leads a cross token to the language model's width by itself (linear, mlp)",
        do="set `cross_tokens: {weight: 0}`, or choose another connector",
    )
