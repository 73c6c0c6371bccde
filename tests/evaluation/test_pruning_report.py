"""What is reported of answers from fewer visual tokens."""

import pytest

from mllm.errors import OptionError
from mllm.evaluation.pruning_report import accuracy, format_table, pruned_case
from mllm.pruning import Pruner, Uniform
from mllm.pruning.statistics import ItemStages

WHOLE = {"caption": {"caption_digit_recall": 0.9, "caption_digit_precision": 0.1}, "count": {"count_accuracy": 0.7}}
FEWER = {"caption": {"caption_digit_recall": 0.5, "caption_digit_precision": 0.1}, "count": {"count_accuracy": 0.3}}


def seen(pruner: Pruner, *lengths: int, layers: int = 4) -> Pruner:
    """A pruner that has seen a prompt with such items."""
    pruner.statistics.items = [[ItemStages(length)] for length in lengths]
    pruner.statistics.tokens_per_layer = [[20]] * layers
    return pruner


def test_the_accuracy_is_the_mean_of_the_tasks_first_metrics():
    assert accuracy(WHOLE) == pytest.approx(0.8)


def test_a_case_says_what_was_kept_of_what_is_known_from_all_tokens():
    case = pruned_case("uniform tokens=0.34", seen(Uniform(tokens=0.34), 9, 9), FEWER, whole=WHOLE)
    assert (case["pruner"], case["method"]) == ("uniform tokens=0.34", "uniform")
    assert (case["tokens"], case["seen"], case["of"]) == (3, 3.0, 9)
    assert case["accuracy"] == pytest.approx(0.4) and case["kept"] == pytest.approx(0.5)
    assert case["tasks"] == FEWER


def test_tokens_seen_are_the_average_over_layers():
    class Falling(Uniform):
        def counts(self, num_tokens: int, num_layers: int) -> list[int]:
            return [num_tokens - layer for layer in range(num_layers)]

    assert pruned_case("x", seen(Falling(tokens=2), 9), FEWER, whole=WHOLE)["seen"] == 7.5


def test_rows_without_pictures_cannot_tell_anything():
    with pytest.raises(OptionError, match="without pictures and videos"):
        pruned_case("uniform", Uniform(), FEWER, whole=WHOLE)


def test_the_table_has_methods_against_budgets():
    """Of one method, other options are another row."""
    cases = [
        {"pruner": pruner, "method": pruner[0], "tokens": tokens, "of": 9, "accuracy": value}
        for pruner, tokens, value in (
            ("a tokens=1", 1, 0.1),
            ("a tokens=2", 2, 0.2),
            ("a tokens=2 by=text", 2, 0.3),
            ("b tokens=0.22", 2, 0.4),
        )
    ]
    lines = [line.split() for line in format_table(cases, unpruned=0.5).splitlines()]
    assert lines == [
        ["visual", "tokens", "1", "of", "9", "2", "of", "9", "all", "9"],
        ["a", "0.100", "0.200", "0.500"],
        ["a", "by=text", "0.300", "0.500"],
        ["b", "0.400", "0.500"],
    ]
