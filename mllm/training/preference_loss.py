"""Losses of preferences out of log-probabilities. Pure.

Every term compares two sides of a pair, each by how much likelier the policy makes it than the reference does:
`delta = log policy(y | x, media) - log reference(y | x, media)`, summed over the answer's tokens.

    text preference     chosen against rejected, under the same media         (DPO and its relatives)
    visual preference   the chosen answer under its media against the same answer under others   (mDPO, Re-Align)
    anchor              the chosen answer against nothing: it must not become less likely        (mDPO)

Sources: DPO (arXiv 2305.18290), mDPO (2406.11839), Re-Align's rDPO (2502.13146), V-DPO (2411.02712), MPO (2411.10442);
the text terms by the names and formulas of `DPOConfig.loss_type` in TRL 1.16. Our `rdpo` is not TRL's `robust`, which
its paper (2403.00409) calls rDPO, too: that one is the text term "robust" here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid, relu

from mllm.errors import OptionError
from mllm.shapes import Float, Int, Tensor

PerPair = Float[Tensor, " P"]


class TextSides(NamedTuple):
    """What a text term is computed from.

    Args:
        chosen: Delta of the chosen answers.
        rejected: Delta of the rejected ones.
        chosen_log_probs: The policy's own of the chosen answers.
        chosen_lengths: Their tokens.
        rejected_lengths: Those of the rejected ones.
    """

    chosen: PerPair
    rejected: PerPair
    chosen_log_probs: PerPair
    chosen_lengths: Int[Tensor, " P"]
    rejected_lengths: Int[Tensor, " P"]


@dataclass(frozen=True)
class LossOptions:
    """What is compared, and how strongly.

    Args:
        beta: How far the policy may go from the reference: the smaller, the farther.
        text: Text terms by name, see `TEXT_LOSSES`, with their weights.
        visual_weight: Of the visual preference; 0 for none.
        anchor_weight: Of the anchor; 0 for none.
        label_smoothing: Of "robust": how likely a preference is the wrong way round.
        guidance: Of V-DPO, in the text terms: how often what an answer owes to the picture counts once more.
    """

    beta: float = 0.1
    text: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)
    visual_weight: float = 0.0
    anchor_weight: float = 0.0
    label_smoothing: float = 0.0
    guidance: float = 0.0


class PreferenceLoss(NamedTuple):
    """The loss of each pair.

    Args:
        losses: To go backward from.
        terms: What each weighted term adds to them, by name.
        rewards: `beta * delta` of each side, by name, without a graph.
    """

    losses: PerPair
    terms: dict[str, PerPair]
    rewards: dict[str, PerPair]


def preference_loss(
    policy: Mapping[str, PerPair],
    reference: Mapping[str, PerPair],
    lengths: Mapping[str, Int[Tensor, " P"]],
    options: LossOptions,
) -> PreferenceLoss:
    """The loss of pairs, from the summed log-probabilities of their sides.

    Args:
        policy: Of the model that is trained, by side: "chosen", "rejected"; "contrast" for a visual preference;
            "chosen_unseen" and "rejected_unseen", under blank media, for guidance.
        reference: The same of the reference model.
        lengths: Supervised tokens of each side.
        options: What is compared.
    """
    delta = {side: policy[side] - reference[side] for side in policy if not side.endswith("_unseen")}
    chosen, rejected = (_guided(delta[side], policy, side, options.guidance) for side in ("chosen", "rejected"))
    sides = TextSides(chosen, rejected, policy["chosen"], lengths["chosen"], lengths["rejected"])
    terms = {name: weight * TEXT_LOSSES[name](sides, options) for name, weight in options.text}
    if options.visual_weight:
        terms["visual"] = options.visual_weight * -logsigmoid(options.beta * (delta["chosen"] - delta["contrast"]))
    if options.anchor_weight:
        terms["anchor"] = options.anchor_weight * -logsigmoid(options.beta * delta["chosen"])
    rewards = {side: (options.beta * value).detach() for side, value in delta.items()}
    return PreferenceLoss(sum(terms.values(), torch.zeros_like(delta["chosen"])), terms, rewards)


def _guided(delta: PerPair, policy: Mapping[str, PerPair], side: str, guidance: float) -> PerPair:
    """V-DPO: what the policy's answer owes to the picture counts once more; the reference stays as it is."""
    if not guidance:
        return delta
    return delta + guidance * (policy[side] - policy[f"{side}_unseen"].detach())


def _sigmoid(sides: TextSides, options: LossOptions) -> PerPair:
    return -logsigmoid(options.beta * (sides.chosen - sides.rejected))


def _hinge(sides: TextSides, options: LossOptions) -> PerPair:
    return relu(1 - options.beta * (sides.chosen - sides.rejected))


def _ipo(sides: TextSides, options: LossOptions) -> PerPair:
    """By the token, as its authors have it (arXiv 2310.12036); `beta` is their tau."""
    margin = sides.chosen / sides.chosen_lengths.clamp(min=1) - sides.rejected / sides.rejected_lengths.clamp(min=1)
    return (margin - 1 / (2 * options.beta)) ** 2


def _robust(sides: TextSides, options: LossOptions) -> PerPair:
    margin, smoothing = options.beta * (sides.chosen - sides.rejected), options.label_smoothing
    clean = -logsigmoid(margin) * (1 - smoothing) + logsigmoid(-margin) * smoothing
    return clean / (1 - 2 * smoothing)


def _apo_zero(sides: TextSides, options: LossOptions) -> PerPair:
    return 1 - (options.beta * sides.chosen).sigmoid() + (options.beta * sides.rejected).sigmoid()


def _bco_pair(sides: TextSides, options: LossOptions) -> PerPair:
    """Without the moving mean of rewards that BCO (arXiv 2404.04656) takes off them, as TRL has it.

    So the loss of a pair is its own, however a step is cut into micro-batches.
    """
    return -logsigmoid(options.beta * sides.chosen) - logsigmoid(-options.beta * sides.rejected)


def _sft(sides: TextSides, options: LossOptions) -> PerPair:
    """The chosen answer's mean loss by the token, as MPO has it.

    TRL takes the mean over the tokens of all answers of a micro-batch: the same of one pair, or of answers of one
    length; else a long answer counts more there, and the more the larger the micro-batch is.
    """
    return -sides.chosen_log_probs / sides.chosen_lengths.clamp(min=1)


TEXT_LOSSES: dict[str, Callable[[TextSides, LossOptions], PerPair]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "apo_zero": _apo_zero,
    "bco_pair": _bco_pair,
    "sft": _sft,
}
"""The text terms, by TRL's names."""


def text_terms(names: object, weights: object) -> tuple[tuple[str, float], ...]:
    """Text terms from `loss_type`, a name or several, and `loss_weights`, 1 each where there are none.

    Raises:
        OptionError: An unknown name, one named twice, or weights that are none.
    """
    listed = [names] if isinstance(names, str) else list(names) if isinstance(names, list | tuple) else [names]
    unknown = [name for name in listed if not isinstance(name, str) or name not in TEXT_LOSSES]
    if unknown or not listed or len(set(listed)) < len(listed):
        raise OptionError(
            f"loss_type = {names!r}",
            expected=f"some of {', '.join(TEXT_LOSSES)}, each once",
            do="correct it; of several write a list, with `loss_weights`",
        )
    factors = [1.0] * len(listed) if weights is None else weights
    if (
        not isinstance(factors, list | tuple)
        or len(factors) != len(listed)
        or not all(isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one < inf for one in factors)
    ):
        raise OptionError(
            f"loss_weights = {weights!r} for loss_type = {names!r}",
            expected=f"{len(listed)} numbers of 0 or more",
            do="give each loss type its weight",
        )
    return tuple((str(name), float(factor)) for name, factor in zip(listed, factors, strict=True))
