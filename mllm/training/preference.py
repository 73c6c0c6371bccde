"""Preference training: a better answer against a worse one, and against itself under another picture."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel

from mllm.data.collate import Collator, PackingCollator, PaddingCollator
from mllm.data.contrasts import CONTRAST, REJECTED
from mllm.data.pairs import names_of_sides
from mllm.inference.generation import eval_mode
from mllm.models.media import VALUES
from mllm.models.parts import freeze_unused
from mllm.models.supervised import attach_supervised_forward
from mllm.shapes import Bool, Float, Int, Tensor, TokenIds
from mllm.training.batching import collator_of
from mllm.training.options import SftArguments
from mllm.training.preference_loss import PreferenceLoss, preference_loss
from mllm.training.preference_meter import PreferenceMeter
from mllm.training.preference_options import PreferenceArguments
from mllm.training.reference import KnownReference
from mllm.training.sharding import hold_frozen
from mllm.training.source_losses import token_sources
from mllm.training.trainer import MllmTrainer

OURS = ("sources", "sequences", "lengths", "reference_log_probs")
"""What a batch holds for the loss, and not for the model."""

DROPOUTS = {"dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop", "drop_prob"}
"""By which names the modules of transformers keep a share that they drop in training themselves."""


class MultimodalDPOTrainer(MllmTrainer):
    """Mean loss over all pairs of the global batch; see `mllm.training.preference_loss`.

    The reference is the model without its adapters, and with the untrained copies of what is trained in full beside
    them; or another model; or what either said before the run. Where encoders are frozen, policy and reference share
    what these see, and the sides of a pair share each picture.

    Args:
        reference: A model that is not trained, prepared by no trainer; None where the model's own adapters are taken
            off, or all is known.
        known: What the reference says of every pair, where it was asked before the run.
        **kwargs: As `MllmTrainer` takes them; its `args` are `PreferenceArguments`.
    """

    args: PreferenceArguments
    unit = "pairs"

    def __init__(
        self,
        model: torch.nn.Module,
        args: PreferenceArguments,
        *,
        reference: torch.nn.Module | None = None,
        known: KnownReference | None = None,
        **kwargs: Any,
    ):
        self.known = known
        self.side_names = names_of_sides(args.sides)
        self.loss_options = args.loss
        self.meter, self.validation_meter = PreferenceMeter(), PreferenceMeter()
        super().__init__(model, args, **kwargs)
        if args.disable_dropout:
            without_dropout(model)
        self.reference_model = None if reference is None else self._prepared(reference)

    def collator(
        self,
        args: SftArguments,
        texts: PaddingCollator | PackingCollator,
        model: torch.nn.Module,
        *,
        is_training: bool,
    ) -> Collator:
        """What makes batches of pairs."""
        known = None
        if self.known is not None:
            known = self.known.training if is_training else self.known.validation
        return collator_of(args, texts, model, reference=known)

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A micro-batch with the side that each supervised token belongs to, and the tokens of each side."""
        batch = with_sides(batch, self.side_names, asks_own_tokens=self.args.released_log_probs)
        if self.known is not None:
            # No tensor: for DeepSpeed transformers casts what a batch holds, and in bfloat16 -500 is -502.
            batch["reference_log_probs"] = batch["reference_log_probs"].tolist()
        return batch

    def num_items(self, batch: dict[str, Any]) -> int:
        """Its pairs."""
        return len(batch["sources"])

    def loss_of(self, model: torch.nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | None) -> Any:
        """The pairs' losses, summed and divided by the pairs of the step; and what the model returned."""
        found, outputs = self._compared(model, inputs, self.meter)
        self.source_losses.add(inputs["sources"], found.losses.detach())
        # Without pairs nothing is left of the sum but its way back through the model, which ranks go together.
        total = found.losses.sum() + 0.0 * outputs.log_probs.sum()
        return total / (num_items if num_items is not None else max(1, len(found.losses))), outputs

    def losses_of(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The source and the loss of each pair of validation."""
        return inputs["sources"], self._compared(model, inputs, self.validation_meter)[0].losses

    def validate(self) -> dict[str, int | float]:
        """The loss of the validation rows, and their rewards, margins and accuracies."""
        return super().validate() | self.validation_meter.read()

    def log(self, logs: dict[str, int | float], start_time: float | None = None) -> None:
        """Add rewards, margins and accuracies to a line about steps; all ranks come here together."""
        if "grad_norm" in logs:
            logs |= self.meter.read()
        super().log(logs, start_time)

    def _compared(
        self, model: torch.nn.Module, inputs: dict[str, Any], meter: PreferenceMeter
    ) -> tuple[PreferenceLoss, Any]:
        """The losses of the pairs of a micro-batch, and what the model returned."""
        taken = {name: value for name, value in inputs.items() if name not in OURS}
        lengths = inputs["lengths"]
        if self.known is not None:
            reference = torch.tensor(inputs["reference_log_probs"], device=lengths.device).view(lengths.shape)
        else:
            with torch.no_grad():
                said, taken = self._ask_reference(model, taken)
            reference = by_side(said, inputs)
        outputs = model(**taken, returns_log_probs=True, use_cache=False)
        policy = by_side(outputs.log_probs, inputs)
        policy, reference, lengths = map(self._named, (policy, reference.to(policy), lengths))
        found = preference_loss(policy, reference, lengths, self.loss_options)
        meter.add(found, policy, reference, lengths)
        return found, outputs

    def _ask_reference(self, model: torch.nn.Module, taken: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What the reference says, and the inputs with which the policy is asked: what it has encoded is not again."""
        with self._as_reference(model) as reference:
            outputs = reference(**taken, returns_log_probs=True, use_cache=False)
        shared = self._of_frozen(outputs.encoder_features or {})
        seen = {VALUES[kind] for kind in VALUES if f"{kind}_features" in shared}
        if "connected_images" in shared:
            seen.add(VALUES["image"])
        return outputs.log_probs, {name: value for name, value in taken.items() if name not in seen} | shared

    def _of_frozen(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """What the policy would see, too: what is frozen is the reference's, unless that is a model of its own.

        The model cannot tell: without its adapters all of it looks frozen.
        """
        if self.args.reference is not None:
            return {}
        trained = {name for name, chosen in self.parts.items() if chosen.mode != "frozen"}
        needs = {"connected_images": {"image.encoder", "image.connector"}, "audio_features": {"audio.encoder"}}
        return {name: value for name, value in features.items() if not needs.get(name, {"image.encoder"}) & trained}

    @contextmanager
    def _as_reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        if self.reference_model is not None:
            yield self.reference_model
            return
        plain = self.accelerator.unwrap_model(model)
        assert isinstance(plain, PeftModel), "a run without adapters has a reference, or what it said"
        with eval_mode(model) if not self.args.disable_dropout else nullcontext(), without_adapters(plain):
            yield model
        freeze_unused(plain)  # PEFT opens them when it puts the adapters on again

    def _named(self, by_side: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.side_names, by_side.unbind(-1), strict=True))

    def _prepared(self, reference: torch.nn.Module) -> torch.nn.Module:
        attach_supervised_forward(reference, blank=self.blank)
        return hold_frozen(reference, self.args, self.accelerator)


def with_sides(batch: dict[str, Any], names: tuple[str, ...], *, asks_own_tokens: bool = False) -> dict[str, Any]:
    """A batch of pairs with the side that each supervised token belongs to, and the tokens of each side.

    Args:
        batch: As `PairCollator` makes it, with `sources`.
        names: Of the sides of a pair.
        asks_own_tokens: See `own_tokens_of`.
    """
    num_pairs, segments = len(batch["sources"]), batch.get("segment_lengths")
    num_sides = num_pairs * len(names)
    sequences = token_sources(batch["labels"], torch.arange(max(1, num_sides)), segments)
    lengths = torch.bincount(sequences, minlength=num_sides).view(num_pairs, len(names))
    batch = {**batch, "sequences": sequences, "lengths": lengths}
    if asks_own_tokens:
        batch["own_tokens"] = own_tokens_of(batch["labels"], names, num_sides, segments)
    return batch


def by_side(log_probs: Float[Tensor, " S"], batch: Mapping[str, Any]) -> Float[Tensor, "P sides"]:
    """The log-probabilities of the tokens of a batch that `with_sides` gave, summed over each side."""
    lengths: Int[Tensor, "P sides"] = batch["lengths"]
    sums = torch.zeros(lengths.numel(), dtype=log_probs.dtype, device=log_probs.device)
    return sums.index_add(0, batch["sequences"], log_probs).view(lengths.shape)


@contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a model is what its run started from: no adapters, and the untrained copies of what is trained."""
    if not isinstance(model, PeftModel):
        yield
        return
    # As PEFT's own `disable_adapter`, but for its look at every parameter, which takes longer than a small step.
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()


def without_dropout(model: torch.nn.Module) -> None:
    """Let nothing of a model be dropped, adapters included: else the reference would not be what it is compared by."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in DROPOUTS & vars(module).keys():
            if isinstance(vars(module)[name], float):
                setattr(module, name, 0.0)


def own_tokens_of(
    labels: TokenIds, names: tuple[str, ...], num_sides: int, segment_lengths: tuple[int, ...] | None
) -> Bool[Tensor, "B T"]:
    """Where Re-Align's released trainer takes a model's own likeliest token: in rejected answers, and the contrast."""
    is_own = torch.tensor([name in (REJECTED, CONTRAST) for name in names]).repeat(max(1, num_sides // len(names)))
    if not num_sides:
        return torch.zeros_like(labels, dtype=torch.bool)
    if segment_lengths is None:
        return is_own[:, None].expand_as(labels)
    return is_own.repeat_interleave(torch.tensor(segment_lengths))[None]
