"""`loss_type` and `loss_weights`, as TRL names them."""

import pytest

from mllm.errors import OptionError
from mllm.training.preference_loss import TEXT_LOSSES, text_terms


def test_one_name_or_several():
    assert text_terms("sigmoid", None) == (("sigmoid", 1.0),)
    assert text_terms(["sigmoid"], [3]) == (("sigmoid", 3.0),)
    assert text_terms(["sigmoid", "bco_pair", "sft"], None) == (("sigmoid", 1.0), ("bco_pair", 1.0), ("sft", 1.0))
    assert text_terms(("sigmoid", "sft"), (0.8, 0)) == (("sigmoid", 0.8), ("sft", 0.0))


@pytest.mark.parametrize("names", ["dpo", ["sigmoid", "rdpo"], [], ["sigmoid", "sigmoid"], 3, {"sigmoid": 1.0}])
def test_names_that_are_none_are_told_which_there_are(names):
    with pytest.raises(OptionError, match="bco_pair") as error:
        text_terms(names, None)
    assert all(name in str(error.value) for name in TEXT_LOSSES)


@pytest.mark.parametrize(
    "weights", [[1.0], [1, 2, 3], [1, -1], [1, True], [1, "2"], 2.0, "12", [1, float("nan")], [1, float("inf")]]
)
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(OptionError, match="2 numbers of 0 or more"):
        text_terms(["sigmoid", "sft"], weights)
