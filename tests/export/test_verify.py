"""The comparison: what counts as equal."""

import math
from dataclasses import replace

import pytest
import torch

from mllm.errors import ExportError
from mllm.export.probes import Answer
from mllm.export.stock_process import up_to_end
from mllm.export.verify import compare, max_difference, stock_answers

OURS = Answer([1, 2], torch.ones(1, 3, 2, 2), torch.tensor([[1.0, -4.0]]), [7, 3], [1.0, 1.0], "a digit")


def test_equal_answers_are_equal():
    parity = compare([OURS, OURS], [OURS, OURS], dtype="float32")
    assert parity.is_equal
    assert (parity.num_probes, parity.max_abs_diff, parity.tolerance) == (2, 0.0, 0.0)


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": [1, 3]},
        {"pixel_values": torch.zeros(1, 3, 2, 2)},
        {"pixel_values": None},
        {"logits": torch.tensor([[1.0, -4.000001]])},
        {"logits": torch.tensor([[1.0, math.nan]])},
        {"logits": OURS.logits.repeat(2, 1)},  # its difference broadcasts to 0
        {"greedy_ids": [7]},
        {"greedy_text": "a  digit"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_one_difference_in_one_probe_is_enough(other):
    assert not compare([OURS, OURS], [OURS, replace(OURS, **other)], dtype="float32").is_equal


def test_short_types_may_differ_by_a_rounding_of_the_largest_logit():
    near = replace(OURS, logits=torch.tensor([[1.0 + 4 * 2.0**-7, -4.0]]))
    far = replace(OURS, logits=torch.tensor([[1.0 + 5 * 2.0**-7, -4.0]]))
    assert compare([OURS], [near], dtype="bfloat16").is_equal
    assert not compare([OURS], [far], dtype="bfloat16").is_equal
    assert not compare([OURS], [near], dtype="float16").is_equal


def test_continuations_of_short_types_may_part_at_a_tie():
    """Tolerance 4 * 2**-7: the two best tokens may be twice that apart."""
    ours = replace(OURS, margins=[1.0, 0.0])
    tie = replace(OURS, greedy_ids=[7, 4], margins=[1.0, 2.0**-4], greedy_text="a dot")
    parity = compare([ours, OURS], [tie, OURS], dtype="bfloat16")
    assert parity.is_equal and not parity.same_tokens
    assert not compare([ours], [tie], dtype="float32").is_equal
    assert not compare([OURS], [tie], dtype="bfloat16").is_equal
    assert not compare([ours], [replace(tie, margins=[1.0, 0.07])], dtype="bfloat16").is_equal
    assert not compare([ours], [replace(OURS, greedy_ids=[7])], dtype="bfloat16").is_equal


def test_a_lost_probe_is_no_equality():
    with pytest.raises(ValueError, match="shorter"):
        compare([OURS, OURS], [OURS], dtype="float32")


def test_differences_that_are_no_numbers():
    one = torch.zeros(2)
    assert max_difference((one, one), (one, one + 2)) == 2.0
    assert math.isnan(max_difference((one, one), (one * math.nan, one + 2)))
    assert max_difference((one,), (torch.zeros(3),)) == math.inf


def test_what_follows_the_first_end_is_padding():
    assert up_to_end(torch.tensor([5, 2, 0, 0]), [2, 9]).tolist() == [5, 2]
    assert up_to_end(torch.tensor([5, 6]), [2]).tolist() == [5, 6]


def test_a_directory_that_cannot_be_used_alone_is_an_error(tmp_path):
    with pytest.raises(ExportError, match="could not be used by transformers alone"):
        stock_answers([tmp_path])
