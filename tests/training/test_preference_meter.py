"""What the log tells of preferences: means over all pairs, however they were cut into micro-batches and ranks."""

import pytest
import torch

from mllm.training.preference_loss import LossOptions, preference_loss
from mllm.training.preference_meter import PreferenceMeter, kl_by_token

SIDES, PAIRS = ("chosen", "rejected", "contrast"), 7
OPTIONS = LossOptions(beta=0.2, visual_weight=0.5)


def _said() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    policy, reference = ({side: -9 * torch.rand(PAIRS).double() for side in SIDES} for _ in range(2))
    return policy, reference, {side: torch.randint(1, 9, (PAIRS,)) for side in SIDES}


def _add(meter: PreferenceMeter, said, pairs: slice) -> None:
    policy, reference, lengths = ({side: values[pairs] for side, values in one.items()} for one in said)
    meter.add(preference_loss(policy, reference, lengths, OPTIONS), policy, reference, lengths)


def test_figures_are_means_over_all_pairs():
    """Of micro-batches of unequal size, one of them empty."""
    said, meter = _said(), PreferenceMeter()
    for cut in (slice(0, 4), slice(4, 4), slice(4, 7)):
        _add(meter, said, cut)
    policy, reference, _ = said
    delta = {side: policy[side] - reference[side] for side in SIDES}
    found = meter.read()
    expected: dict[str, torch.Tensor] = {f"rewards/{side}": 0.2 * delta[side] for side in SIDES}
    expected |= {f"log_probs/{side}": policy[side] for side in SIDES}
    for name, other in (("text", "rejected"), ("visual", "contrast")):
        margin = 0.2 * (delta["chosen"] - delta[other])
        expected |= {f"margins/{name}": margin, f"accuracies/{name}": (margin > 0).double()}
        weight = {"text": 1.0, "visual": 0.5}[name]
        term = {"text": "sigmoid", "visual": "visual"}[name]
        expected[f"loss_terms/{term}"] = -weight * torch.nn.functional.logsigmoid(margin)
    expected["kl"] = kl_by_token(policy["chosen"], reference["chosen"], said[2]["chosen"])
    assert found == pytest.approx({name: float(values.mean()) for name, values in expected.items()}, abs=1e-9)


def test_what_was_read_is_forgotten():
    said, meter = _said(), PreferenceMeter()
    assert meter.read() == {}
    _add(meter, said, slice(0, 3))
    meter.read()
    assert meter.read() == {}
    _add(meter, said, slice(3, 7))
    own = PreferenceMeter()
    _add(own, said, slice(3, 7))
    assert meter.read() == own.read()


def test_ranks_together_are_one(two_ranks):
    """The second of them has no pairs at all in what is read first, and some in what is read then."""
    two_ranks(_read_on_two_ranks)


def _read_on_two_ranks() -> None:
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    said, meter, whole = _said(), PreferenceMeter(), PreferenceMeter()  # the same numbers on both
    for cuts in ((slice(0, 5), None), (slice(5, 6), slice(6, 7))):
        if cuts[rank] is not None:
            _add(meter, said, cuts[rank])
        found = meter.read()
        for cut in cuts:
            if cut is not None and rank == 0:
                _add(whole, said, cut)
        assert found == pytest.approx(whole.read(), abs=1e-9)


def test_the_distance_is_none_only_where_nothing_has_changed():
    said, lengths = -9 * torch.rand(5).double(), torch.tensor([1, 2, 3, 4, 5])
    assert not kl_by_token(said, said, lengths).any()
    for shift in (-2.0, 1e-3, 3.0):
        ratio = shift / lengths.double()
        found = kl_by_token(said - shift, said, lengths)
        assert bool((found > 0).all())
        torch.testing.assert_close(found, ratio.exp() - 1 - ratio, rtol=1e-9, atol=1e-9)


def test_the_distance_of_a_policy_that_has_lost_all_it_knew_is_a_number():
    """In float32 the exponential of 100 nats by token is none."""
    found = kl_by_token(torch.tensor([-400.0]), torch.tensor([0.0]), torch.tensor([4]))
    assert torch.isfinite(found).all()
