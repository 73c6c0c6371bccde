"""Muon for many small matrices: the optimiser of the digits world's encoder and language model."""

import torch


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, all matrices of one shape at a time.

    On two CPU cores many small matrices one by one take more than twice as long.

    Args:
        matrices: What is trained.
        lr: Learning rate, on AdamW's scale.
        weight_decay: Decoupled, as AdamW's.
        momentum: Of the gradients, in Nesterov's form.
    """

    def __init__(self, matrices: list[torch.Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.momentum = momentum
        self.is_tall = {weight: weight.shape[0] > weight.shape[1] for weight in matrices}
        self.stacks: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for weight in matrices:
            self.stacks.setdefault(tuple(sorted(weight.shape)), []).append(weight)
        self.averages = {shape: torch.zeros(len(stack), *shape) for shape, stack in self.stacks.items()}

    @torch.no_grad()
    def step(self) -> None:
        settings = self.param_groups[0]
        for shape, stack in self.stacks.items():
            gradients = torch.stack([w.grad.mT if self.is_tall[w] else w.grad for w in stack])
            average = self.averages[shape].lerp_(gradients, 1 - self.momentum)
            updates = orthogonal(gradients.lerp(average, self.momentum))
            rate = settings["lr"] * 0.2 * max(shape) ** 0.5
            for weight, update in zip(stack, updates, strict=True):
                weight.mul_(1 - settings["lr"] * settings["weight_decay"])
                weight.sub_(update.mT if self.is_tall[weight] else update, alpha=rate)


def orthogonal(stack: torch.Tensor) -> torch.Tensor:
    """Matrices [N, rows, columns], no more rows than columns, with all singular values near 1: Newton-Schulz, quintic.

    Source: torch.optim._muon (Jordan et al., 2024), in bfloat16 as there.
    """
    matrices = stack.bfloat16()
    matrices = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = matrices @ matrices.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        matrices = torch.baddbmm(matrices, polynomial, matrices, beta=3.4445)
    return matrices.to(stack.dtype)
