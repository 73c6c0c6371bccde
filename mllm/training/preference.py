"""Preference training: a better answer against a worse one, and against itself under another picture."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel

from mllm.data.collate import Collator, PackingCollator, PaddingCollator
from mllm.data.collate_pairs import PairCollator
from mllm.data.pairs import CONTRAST, REJECTED, names_of_sides
from mllm.models.media import VALUES
from mllm.models.parts import freeze_unused
from mllm.models.supervised import takes_shared_media
from mllm.shapes import Bool, Float, Int, Tensor, TokenIds
from mllm.training.preference_loss import preference_loss
from mllm.training.preference_meter import PreferenceMeter
from mllm.training.preference_options import PreferenceArguments
from mllm.training.reference import ReferenceLogProbs
from mllm.training.source_losses import token_sources
from mllm.training.trainer import MllmTrainer

OURS = ("sources", "sequences", "lengths", "reference_log_probs")
"""What a batch holds for the loss, and not for the model."""


class MultimodalDPOTrainer(MllmTrainer):
    """Mean loss over all pairs of the global batch; see `mllm.training.preference_loss`.

    The reference is the model without its adapters, and with the untrained copies of what is trained in full beside
    them; or another model; or what either said before the run. Where encoders are frozen, policy and reference share
    what these see, and the sides of a pair share each picture.

    Args:
        reference: A model that is not trained, prepared by no trainer; None where the model's own adapters are taken
            off, or all is known.
        known: What the reference says of every pair, where it was asked beforehand.
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
        known: ReferenceLogProbs | None = None,
        **kwargs: Any,
    ):
        self.known = known
        self.contrast = args.sides
        self.side_names = names_of_sides(self.contrast)
        self.meter = PreferenceMeter()
        super().__init__(model, args, **kwargs)
        if args.disable_dropout:
            without_dropout(model)
        self.loss_options = args.loss
        self.reference_model = None if reference is None else self._prepared(reference)

    def collator(self, texts: PaddingCollator | PackingCollator, model: torch.nn.Module) -> Collator:
        """What makes batches of pairs."""
        return PairCollator(
            texts, contrast=self.contrast, shares_media=takes_shared_media(model), reference=self.known
        )

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A micro-batch with the side that each supervised token belongs to, and the tokens of each side."""
        num_sides = len(batch["sources"]) * len(self.side_names)
        segments = batch.get("segment_lengths")
        sequences = token_sources(batch["labels"], torch.arange(max(1, num_sides)), segments)
        lengths = torch.bincount(sequences, minlength=num_sides).view(len(batch["sources"]), len(self.side_names))
        batch = {**batch, "sequences": sequences, "lengths": lengths}
        if self.args.released_log_probs:
            batch["own_tokens"] = own_tokens_of(batch["labels"], self.side_names, num_sides, segments)
        return batch

    def num_items(self, batch: dict[str, Any]) -> int:
        """Its pairs."""
        return len(batch["sources"])

    def loss_of(self, model: torch.nn.Module, inputs: dict[str, Any], num_items: torch.Tensor | None) -> Any:
        """The pairs' losses, summed and divided by the pairs of the step; and what the model returned."""
        taken = {name: value for name, value in inputs.items() if name not in OURS}
        known = inputs.get("reference_log_probs")
        if known is None:
            with torch.no_grad():
                said, taken = self._ask_reference(model, taken)
            known = self._by_side(said, inputs)
        outputs = model(**taken, returns_log_probs=True, use_cache=False)
        policy = self._by_side(outputs.log_probs, inputs)
        found = preference_loss(
            self._named(policy), self._named(known.to(policy)), self._named(inputs["lengths"]), self.loss_options
        )
        self.meter.add(found, self._named(policy), self._named(known), self._named(inputs["lengths"]))
        self.source_losses.add(inputs["sources"], found.losses.detach())
        # Without pairs nothing is left of the sum but its way back through the model, which ranks go together.
        total = found.losses.sum() + 0.0 * outputs.log_probs.sum()
        return total / (num_items if num_items is not None else max(1, len(found.losses))), outputs

    def log(self, logs: dict[str, int | float], start_time: float | None = None) -> None:
        """Add rewards, margins and accuracies to a line about steps; all ranks come here together."""
        if "grad_norm" in logs:
            logs |= self.meter.read()
        super().log(logs, start_time)

    def _ask_reference(self, model: torch.nn.Module, taken: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What the reference says, and the inputs with which the policy is asked: what it has encoded is not again."""
        with self._as_reference(model) as reference:
            outputs = reference(**taken, returns_log_probs=True, use_cache=False)
        shared = {} if self.reference_model is not None else self._of_frozen(outputs.encoder_features or {})
        seen = {VALUES[kind] for kind in VALUES if f"{kind}_features" in shared}
        if "connected_images" in shared:
            seen.add(VALUES["image"])
        return outputs.log_probs, {name: value for name, value in taken.items() if name not in seen} | shared

    def _of_frozen(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """What the policy would see, too. The model cannot tell: without its adapters all of it looks frozen."""
        trained = {name for name, chosen in self.parts.items() if chosen.mode != "frozen"}
        needs = {"connected_images": {"image.encoder", "image.connector"}, "audio_features": {"audio.encoder"}}
        return {name: value for name, value in features.items() if not needs.get(name, {"image.encoder"}) & trained}

    @contextmanager
    def _as_reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        if self.reference_model is not None:
            yield self.reference_model
            return
        plain = self.accelerator.unwrap_model(model)
        with without_adapters(plain):
            yield model
        freeze_unused(plain)  # PEFT opens them when it puts the adapters on again

    def _by_side(self, log_probs: Float[Tensor, " S"], inputs: Mapping[str, Any]) -> Float[Tensor, "P sides"]:
        lengths: Int[Tensor, "P sides"] = inputs["lengths"]
        sums = torch.zeros(lengths.numel(), dtype=log_probs.dtype, device=log_probs.device)
        return sums.index_add(0, inputs["sequences"], log_probs).view(lengths.shape)

    def _named(self, by_side: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.side_names, by_side.unbind(-1), strict=True))

    def _prepared(self, reference: torch.nn.Module) -> torch.nn.Module:
        reference.requires_grad_(False).eval()
        return self.accelerator.prepare_model(reference, evaluation_mode=True)


def without_adapters(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Inside, a model is what its run started from: no adapters, and the untrained copies of what is trained."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def without_dropout(model: torch.nn.Module) -> None:
    """Let nothing of a model be dropped, adapters included: else the reference would not be what it is compared by."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
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
