"""What the log tells of preferences: rewards, margins, how often they are right, how far the policy has gone."""

from collections.abc import Mapping

import torch
from accelerate.utils import gather_object

from mllm.shapes import Int, Tensor
from mllm.training.preference_loss import PerPair, PreferenceLoss

PREFERENCES = {"text": "rejected", "visual": "contrast"}
"""What the chosen answer is compared with in each."""


class PreferenceMeter:
    """Sums up over micro-batches, on this rank, without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(
        self,
        found: PreferenceLoss,
        policy: Mapping[str, PerPair],
        reference: Mapping[str, PerPair],
        lengths: Mapping[str, Int[Tensor, " P"]],
    ) -> None:
        """Take the pairs of a micro-batch: their losses, and the log-probabilities of their sides."""
        self._count += len(found.losses)
        rewards = found.rewards
        self._sum({f"loss_terms/{name}": values for name, values in found.terms.items()})
        self._sum({f"rewards/{side}": values for side, values in rewards.items()})
        for name, other in PREFERENCES.items():
            if other in rewards:
                margin = rewards["chosen"] - rewards[other]
                self._sum({f"margins/{name}": margin, f"accuracies/{name}": (margin > 0).to(margin)})
        self._sum({f"log_probs/{side}": values for side, values in policy.items()})
        self._sum({"kl": kl_by_token(policy["chosen"], reference["chosen"], lengths["chosen"])})

    def read(self) -> dict[str, float]:
        """The means over all pairs that any rank has seen since this was last read; all ranks ask together.

        Returns:
            "loss_terms/NAME", "rewards/SIDE", "log_probs/SIDE", "margins/text" and "accuracies/text" (chosen against
            rejected), "margins/visual" and "accuracies/visual" (the picture against its contrast), "kl", see
            `kl_by_token`. Nothing where nothing was seen.
        """
        own = {name: float(value) for name, value in self._sums.items()}
        ranks = gather_object([(own, self._count)])
        self._sums, self._count = {}, 0
        pairs = sum(count for _, count in ranks)
        if not pairs:
            return {}
        names = list(dict.fromkeys(name for sums, _ in ranks for name in sums))
        return {name: sum(sums.get(name, 0.0) for sums, _ in ranks) / pairs for name in names}

    def _sum(self, values: Mapping[str, PerPair]) -> None:
        for name, of_pairs in values.items():
            exact = _exact(of_pairs)
            self._sums[name] = self._sums.get(name, torch.zeros((), device=exact.device)) + exact.sum()


def kl_by_token(policy: PerPair, reference: PerPair, lengths: Int[Tensor, " P"]) -> PerPair:
    """How far the policy is from the reference on each answer, by the token: 0 where both say the same, else more.

    Schulman's k3 of the answer's mean log-ratio. An estimate of the divergence it is only as far as the policy would
    give such answers itself; what it is good for is to see the policy drift.
    """
    log_ratio = (_exact(reference) - _exact(policy)) / lengths.clamp(min=1)
    return log_ratio.exp() - 1 - log_ratio


def _exact(values: PerPair) -> PerPair:
    """Without a graph, and in float64 where the device knows it."""
    return values.detach() if values.device.type == "mps" else values.detach().double()
