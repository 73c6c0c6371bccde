"""Each text loss == that of TRL's `DPOTrainer` on the same log-probabilities in float64: loss, gradients, rewards."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from mllm.training.preference_loss import TEXT_LOSSES, LossOptions, preference_loss

PAIRS, LENGTHS = 5, {"chosen": (3, 7, 1, 4, 6), "rejected": (5, 2, 1, 4, 9)}
BETA, SMOOTHING = 0.3, 0.15
EXACT = {"rtol": 1e-9, "atol": 1e-9}

trl = pytest.importorskip("trl")


@pytest.mark.parametrize("name", TEXT_LOSSES)
def test_every_text_loss_is_trls(name):
    """Loss, gradients, rewards and margins on the same log-probabilities of tokens."""
    _assert_equals_trl(((name, 1.0),), by_pair=name == "sft")


def test_mixtures_are_trls():
    """MPO."""
    _assert_equals_trl((("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)), by_pair=True)


def test_sft_is_trls_of_answers_that_are_equally_long():
    lengths = {"chosen": (4,) * PAIRS, "rejected": LENGTHS["rejected"]}
    _assert_equals_trl((("sft", 1.0),), by_pair=False, lengths=lengths)


def _assert_equals_trl(text, *, by_pair: bool, lengths=LENGTHS) -> None:
    """With `by_pair` TRL is given one pair at a time: its "sft" is a mean over the tokens of a micro-batch."""
    width = max(max(of_side) for of_side in lengths.values())
    tokens = {side: _tokens(of_side, width).requires_grad_() for side, of_side in lengths.items()}
    policy = {side: values.sum(1) for side, values in tokens.items()}
    reference = {side: -20 * torch.rand(PAIRS).double() for side in lengths}
    counts = {side: torch.tensor(of_side) for side, of_side in lengths.items()}
    found = preference_loss(policy, reference, counts, LossOptions(BETA, text, label_smoothing=SMOOTHING))
    groups = [[pair] for pair in range(PAIRS)] if by_pair else [list(range(PAIRS))]
    theirs = [_trl_loss(text, tokens, reference, counts, group) for group in groups]
    loss = torch.stack([one for one, _ in theirs]).mean()
    torch.testing.assert_close(found.losses.mean(), loss, **EXACT)
    for side, gradients in _gradients(tokens, found.losses.mean(), loss).items():
        is_token = torch.arange(width) < counts[side][:, None]  # of what is behind an answer there is none to compare
        torch.testing.assert_close(*(gradient * is_token for gradient in gradients), **EXACT)
    margin = found.rewards["chosen"] - found.rewards["rejected"]
    for name, expected in (
        ("rewards/chosen", found.rewards["chosen"]), ("rewards/rejected", found.rewards["rejected"]),
        ("rewards/margins", margin), ("rewards/accuracies", (margin > 0).double()),
    ):  # fmt: skip
        logged = sum(value for _, metrics in theirs for value in metrics[name]) / len(theirs)
        assert logged == pytest.approx(float(expected.mean()), abs=1e-6)


def _tokens(lengths, width: int) -> torch.Tensor:
    """Log-probabilities of the tokens of answers, 0 behind their end."""
    is_token = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.where(is_token, -4 * torch.rand(len(lengths), width).double(), 0.0)


def _gradients(tokens, *losses) -> dict[str, tuple[torch.Tensor, ...]]:
    """Of each side those of one loss and of the other."""
    found = [
        torch.autograd.grad(loss, list(tokens.values()), allow_unused=True, materialize_grads=True) for loss in losses
    ]
    return dict(zip(tokens, zip(*found, strict=True), strict=True))


def _trl_loss(text, tokens, reference, counts, pairs) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """`DPOTrainer.compute_loss` where a model says just these log-probabilities: one token of prompt, then the answer.

    The trainer is not initialised, which would ask for a model, a tokenizer and data: it has what its loss reads.
    """
    both = torch.cat([tokens["chosen"][pairs], tokens["rejected"][pairs]])
    lengths = torch.cat([counts["chosen"][pairs], counts["rejected"][pairs]])
    mask = (torch.arange(both.shape[1]) < lengths[:, None]).long()
    mask = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask], dim=1)
    blank = torch.zeros_like(both)
    said = SimpleNamespace(log_probs=both, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    alone = SimpleNamespace(device="cpu", gather=lambda values: values, gather_for_metrics=lambda values: values)
    trainer = object.__new__(trl.DPOTrainer)
    vars(trainer).update(
        accelerator=alone, model=SimpleNamespace(training=True), args=SimpleNamespace(max_length=None),
        beta=BETA, label_smoothing=SMOOTHING, loss_types=[name for name, _ in text],
        loss_weights=[weight for _, weight in text], f_divergence_type="reverse_kl", ld_alpha=None,
        use_weighting=False, aux_loss_enabled=False, precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": reference["chosen"][pairs], "ref_rejected_logps": reference["rejected"][pairs],
    }  # fmt: skip
    loss = trainer.compute_loss(lambda **_: said, inputs)
    return loss, trainer._metrics["train"]
