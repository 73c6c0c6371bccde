"""Preference losses == their formulas, written out pair by pair in Python's floats."""

import math

import pytest
import torch

from mllm.training.preference_loss import TEXT_LOSSES, LossOptions, preference_loss
from mllm.training.preference_options import PRESETS

PAIRS, LENGTHS = 5, {"chosen": (3, 7, 1, 4, 6), "rejected": (5, 2, 1, 4, 9)}
BETA, SMOOTHING = 0.3, 0.15
UNSEEN = ("chosen_unseen", "rejected_unseen")
EXACT = {"rtol": 1e-9, "atol": 1e-9}
LN_2 = math.log(2)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Of a chosen and a rejected delta, the policy's own log-probability of the chosen answer, and both lengths.
FORMULAS = {
    "sigmoid": lambda win, lose, own, n, m: -log_sigmoid(BETA * (win - lose)),
    "hinge": lambda win, lose, own, n, m: max(0.0, 1 - BETA * (win - lose)),
    "ipo": lambda win, lose, own, n, m: (win / n - lose / m - 1 / (2 * BETA)) ** 2,
    "robust": lambda win, lose, own, n, m: (
        (-(1 - SMOOTHING) * log_sigmoid(BETA * (win - lose)) + SMOOTHING * log_sigmoid(-BETA * (win - lose)))
        / (1 - 2 * SMOOTHING)
    ),
    "apo_zero": lambda win, lose, own, n, m: (1 - sigmoid(BETA * win)) + sigmoid(BETA * lose),
    "bco_pair": lambda win, lose, own, n, m: -log_sigmoid(BETA * win) - log_sigmoid(-BETA * lose),
    "sft": lambda win, lose, own, n, m: -own / n,
}
AT_THE_START = {
    "sigmoid": LN_2, "hinge": 1.0, "ipo": 1 / (2 * BETA) ** 2, "robust": LN_2, "apo_zero": 1.0, "bco_pair": 2 * LN_2,
}  # fmt: skip


def _options(**chosen) -> LossOptions:
    return LossOptions(**{"beta": BETA, "label_smoothing": SMOOTHING, **chosen})


def _sums(*sides: str, is_trained: bool = False) -> dict[str, torch.Tensor]:
    """Log-probabilities that lie up to some tens of nats apart."""
    return {side: -20 * torch.rand(PAIRS).double() - 1 for side in sides} | {
        side: (-20 * torch.rand(PAIRS).double() - 1).requires_grad_() for side in sides if is_trained
    }


def _of_each(value: float) -> torch.Tensor:
    return torch.full((PAIRS,), value, dtype=torch.float64)


def _lengths() -> dict[str, torch.Tensor]:
    return {side: torch.tensor(lengths) for side, lengths in LENGTHS.items()}


def _by_pair(policy, reference) -> list[tuple[dict[str, float], dict[str, float]]]:
    """What both say of each pair, and by how much likelier the policy makes its sides."""
    said, known = (
        [{side: float(values[pair]) for side, values in one.items()} for pair in range(PAIRS)]
        for one in (policy, reference)
    )
    return [(own, {side: own[side] - of[side] for side in of}) for own, of in zip(said, known, strict=True)]


@pytest.mark.parametrize("name", TEXT_LOSSES)
def test_every_text_term_equals_its_formula(name):
    policy, reference = _sums("chosen", "rejected"), _sums("chosen", "rejected")
    found = preference_loss(policy, reference, _lengths(), _options(text=((name, 1.0),)))
    expected = [
        FORMULAS[name](delta["chosen"], delta["rejected"], own["chosen"], n, m)
        for (own, delta), n, m in zip(_by_pair(policy, reference), *LENGTHS.values(), strict=True)
    ]
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(found.terms[name], found.losses, **EXACT)


def test_every_text_term_has_a_formula_here():
    assert FORMULAS.keys() == TEXT_LOSSES.keys()


@pytest.mark.parametrize("visual_weight", [1.0, 0.25])
def test_rdpo_equals_its_formula(visual_weight):
    """Re-Align, equation 1: -log s(b dw - b dl) - w log s(b dw - b dw under the retrieved image)."""
    policy, reference = (_sums("chosen", "rejected", "contrast") for _ in range(2))
    found = preference_loss(policy, reference, _lengths(), _options(visual_weight=visual_weight))
    expected = [
        -log_sigmoid(BETA * (d["chosen"] - d["rejected"]))
        - visual_weight * log_sigmoid(BETA * (d["chosen"] - d["contrast"]))
        for _, d in _by_pair(policy, reference)
    ]
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_mdpo_equals_its_formula():
    """-log s(b [dw - dl]) - log s(b [dw - dw under the crop]) - log s(b dw)."""
    policy, reference = (_sums("chosen", "rejected", "contrast") for _ in range(2))
    found = preference_loss(policy, reference, _lengths(), _options(visual_weight=1.0, anchor_weight=1.0))
    expected = [
        -log_sigmoid(BETA * (d["chosen"] - d["rejected"]))
        - log_sigmoid(BETA * (d["chosen"] - d["contrast"]))
        - log_sigmoid(BETA * d["chosen"])
        for _, d in _by_pair(policy, reference)
    ]
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(sum(found.terms.values()), found.losses, **EXACT)


@pytest.mark.parametrize("guidance", [0.5, 1.0])
def test_vdpo_equals_its_formula(guidance):
    """In DPO, log p(y | x, v) becomes g log p(y | x, v) - (g - 1) log p(y | x) for the policy, g = guidance + 1."""
    policy, reference = _sums("chosen", "rejected", *UNSEEN), _sums("chosen", "rejected", *UNSEEN)
    found = preference_loss(policy, reference, _lengths(), _options(guidance=guidance))
    gamma, expected = guidance + 1, []
    for pair in range(PAIRS):
        own, known = ({side: float(values[pair]) for side, values in said.items()} for said in (policy, reference))
        delta = {
            side: gamma * own[side] - (gamma - 1) * own[f"{side}_unseen"] - known[side]
            for side in ("chosen", "rejected")
        }
        expected.append(-log_sigmoid(BETA * (delta["chosen"] - delta["rejected"])))
    torch.testing.assert_close(found.losses, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_guidance_teaches_nothing_about_the_blank_picture():
    """Its part is held fixed; what it adds to the gradient of the rest is its factor."""
    policy, reference = _sums("chosen", "rejected", *UNSEEN, is_trained=True), _sums("chosen", "rejected", *UNSEEN)
    loss = preference_loss(policy, reference, _lengths(), _options(guidance=0.5)).losses.sum()
    loss.backward()
    assert all(policy[side].grad is None for side in UNSEEN)
    torch.testing.assert_close(policy["chosen"].grad, -policy["rejected"].grad, **EXACT)


def test_guidance_is_of_the_text_terms_alone():
    policy, reference = (_sums("chosen", "rejected", "contrast", *UNSEEN) for _ in range(2))
    plain, guided = (
        preference_loss(policy, reference, _lengths(), _options(visual_weight=1.0, anchor_weight=1.0, guidance=one))
        for one in (0.0, 0.5)
    )
    changed = {name for name, values in plain.terms.items() if not torch.equal(values, guided.terms[name])}
    assert changed == {"sigmoid"}


@pytest.mark.parametrize(("chosen", "touched"), [
    ({}, {"chosen", "rejected"}),
    ({"text": (("sigmoid", 0.0),), "visual_weight": 1.0}, {"chosen", "contrast"}),
    ({"text": (("sigmoid", 0.0),), "anchor_weight": 1.0}, {"chosen"}),
])  # fmt: skip
def test_each_term_pulls_at_its_own_sides(chosen, touched):
    policy, reference = (_sums("chosen", "rejected", "contrast", is_trained=trained) for trained in (True, False))
    preference_loss(policy, reference, _lengths(), _options(**chosen)).losses.sum().backward()
    moved = {side for side, values in policy.items() if values.grad is not None and bool(values.grad.any())}
    assert moved == touched
    assert bool((policy["chosen"].grad < 0).all())  # the better answer is to become likelier


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "apo_zero", "bco_pair"])
@pytest.mark.parametrize("delta", [1e4, -1e4])
def test_what_is_far_off_stays_finite(name, delta):
    """Ten thousand nats, either way round; an exponential of them would be none."""
    policy = {"chosen": _of_each(delta).requires_grad_(), "rejected": -_of_each(delta)}
    reference = {"chosen": _of_each(0.0), "rejected": _of_each(0.0)}
    losses = preference_loss(policy, reference, _lengths(), _options(text=((name, 1.0),))).losses
    losses.sum().backward()
    assert bool(torch.isfinite(losses).all() and torch.isfinite(policy["chosen"].grad).all())


@pytest.mark.parametrize("name", AT_THE_START)
def test_where_policy_and_reference_say_the_same_every_term_is_known(name):
    said = _sums("chosen", "rejected")
    found = preference_loss(said, said, _lengths(), _options(text=((name, 1.0),)))
    torch.testing.assert_close(found.losses, _of_each(AT_THE_START[name]), **EXACT)
    assert not any(bool(values.any()) for values in found.rewards.values())


@pytest.mark.parametrize(("preset", "twos"), [("dpo", 1), ("rdpo", 2), ("mdpo", 3)])
def test_presets_start_at_ln_2_for_each_comparison(preset, twos):
    said = _sums("chosen", "rejected", "contrast")
    chosen = {name: PRESETS[preset][name] for name in ("visual_weight", "anchor_weight", "guidance")}
    found = preference_loss(said, said, _lengths(), _options(**chosen))
    torch.testing.assert_close(found.losses, _of_each(twos * LN_2), **EXACT)


@pytest.mark.parametrize("name", TEXT_LOSSES)
def test_a_pair_costs_the_same_alone_as_among_others(name):
    """So a step can be cut into micro-batches anywhere."""
    sides = ("chosen", "rejected", "contrast", *UNSEEN)
    policy, reference, lengths = _sums(*sides), _sums(*sides), _lengths()
    options = _options(text=((name, 1.0),), visual_weight=1.0, anchor_weight=1.0, guidance=0.5)
    together = preference_loss(policy, reference, lengths, options).losses
    alone = [
        preference_loss(*({side: values[pair][None] for side, values in one.items()} for one in parts), options).losses
        for parts in [(policy, reference, lengths)]
        for pair in range(PAIRS)
    ]
    torch.testing.assert_close(torch.cat(alone), together, **EXACT)


def test_no_pair_costs_nothing():
    empty = {side: torch.zeros(0).double() for side in ("chosen", "rejected", "contrast")}
    lengths = {side: torch.zeros(0, dtype=torch.long) for side in empty}
    found = preference_loss(empty, empty, lengths, _options(visual_weight=1.0))
    assert found.losses.sum() == 0.0 and found.losses.shape == (0,)


def test_rewards_are_the_plain_ones():
    """Beta times delta of each side, guided or not, and without a graph."""
    policy, reference = _sums("chosen", "rejected", *UNSEEN, is_trained=True), _sums("chosen", "rejected", *UNSEEN)
    found = preference_loss(policy, reference, _lengths(), _options(guidance=0.5))
    assert set(found.rewards) == {"chosen", "rejected"}
    for side, values in found.rewards.items():
        assert not values.requires_grad
        torch.testing.assert_close(values, BETA * (policy[side] - reference[side]).detach(), **EXACT)
