"""What the log tells of preferences: rewards, margins, how often they are right, how far the policy has gone."""

from collections.abc import Mapping

import torch
from accelerate.utils import gather_object

from mllm.shapes import Float, Int, Tensor
from mllm.training.preference_loss import PreferenceLoss


class PreferenceMeter:
    """Sums up over micro-batches, on this rank, without waiting for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(
        self,
        found: PreferenceLoss,
        policy: Mapping[str, Float[Tensor, " P"]],
        reference: Mapping[str, Float[Tensor, " P"]],
        lengths: Mapping[str, Int[Tensor, " P"]],
    ) -> None:
        """Take the pairs of a micro-batch: their losses, and the log-probabilities of their sides."""
        self._count += len(found.losses)
        self._sum({f"loss_terms/{name}": values.detach() for name, values in found.terms.items()})
        rewards = found.rewards
        self._sum({f"rewards/{side}": values for side, values in rewards.items()})
        for name, other in (("text", "rejected"), ("visual", "contrast")):
            if other in rewards:
                margin = rewards["chosen"] - rewards[other]
                self._sum({f"margins/{name}": margin, f"accuracies/{name}": (margin > 0).to(margin)})
        self._sum({f"log_probs/{side}": values.detach() for side, values in policy.items()})
        per_token = (reference["chosen"] - policy["chosen"].detach()) / lengths["chosen"].clamp(min=1)
        self._sum({"kl": per_token.exp() - 1 - per_token})

    def read(self) -> dict[str, float]:
        """The means over all pairs that any rank has seen since this was last read; all ranks ask together.

        Returns:
            "loss_terms/NAME", "rewards/SIDE", "log_probs/SIDE", "margins/text" and "accuracies/text" (chosen against
            rejected), "margins/visual" and "accuracies/visual" (the picture against its contrast), "kl": how far the
            policy is from the reference, estimated on the chosen answers (Schulman's k3, of the mean by the token).
            Nothing where nothing was seen.
        """
        own = {name: float(value) for name, value in self._sums.items()}
        ranks = gather_object([(own, self._count)])
        self._sums, self._count = {}, 0
        pairs = sum(count for _, count in ranks)
        if not pairs:
            return {}
        names = list(dict.fromkeys(name for sums, _ in ranks for name in sums))
        return {name: sum(sums.get(name, 0.0) for sums, _ in ranks) / pairs for name in names}

    def _sum(self, values: Mapping[str, Float[Tensor, " P"]]) -> None:
        for name, of_pairs in values.items():
            exact = of_pairs if of_pairs.device.type == "mps" else of_pairs.double()
            self._sums[name] = self._sums.get(name, torch.zeros((), device=exact.device)) + exact.sum()
