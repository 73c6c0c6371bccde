"""How many vectors a connector makes of how many features."""

import pytest

from mllm.errors import OptionError
from mllm.sizes import LengthRule


def test_lengths_by_hand():
    assert [LengthRule().count(length) for length in (0, 1, 7)] == [0, 1, 7]
    assert [LengthRule("fixed", tokens=32).count(length) for length in (0, 1, 257)] == [32, 32, 32]
    # Windows of 15 become 3 each (Granite-speech).
    assert [LengthRule("windows", size=15, tokens=3).count(length) for length in (0, 1, 15, 16)] == [0, 3, 3, 6]
    # 27 x 27 patches of SigLIP at 384 px, 2 x 2 of them at a time: 14 x 14.
    assert LengthRule("grid", size=2).count(27 * 27) == 196
    assert LengthRule("grid", size=2, tokens=2).count(24 * 24) == 288


def test_an_incomplete_window_is_dropped_if_so_wanted_but_never_the_only_one():
    rule = LengthRule("windows", size=2, rounds_up=False)
    assert [rule.count(length) for length in (0, 1, 2, 3, 4, 1500)] == [0, 1, 1, 1, 2, 750]


def test_what_is_no_rule_or_no_square():
    for wrong in ({"kind": "half"}, {"size": 0}, {"tokens": 0}):
        with pytest.raises(OptionError, match="a kind among each, fixed, windows, grid, and positive numbers"):
            LengthRule(**wrong)
    with pytest.raises(OptionError, match="257 features"):
        LengthRule("grid").count(257)
