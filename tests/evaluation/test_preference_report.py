"""The table of what preference training changed."""

import json

import pytest

from mllm.evaluation.preference_report import BEFORE, SHOWN, format_table, read_scores, summarize


def scores(before, rdpo, recall=(0.80, 0.80)):
    return {
        BEFORE: {"hallucinated_mentions": before, "mentioned_recall": recall[0]},
        "rdpo": {"hallucinated_mentions": rdpo, "mentioned_recall": recall[1]},
    }


def test_figures_are_read_from_an_evaluation(tmp_path):
    tasks = {
        "caption": {"model": {"caption_digit_recall": 0.5}, "hallucination": {"hallucinated_mentions": 0.25}},
        "count": {"model": {"count_accuracy": 0.75}, "hallucination": {}},
    }
    (tmp_path / "rdpo.json").write_text(json.dumps({"tasks": tasks}))
    assert read_scores(tmp_path / "rdpo.json") == {
        "caption_digit_recall": 0.5,
        "hallucinated_mentions": 0.25,
        "count_accuracy": 0.75,
    }


def test_the_reduction_is_that_of_the_means():
    report = summarize({0: scores(0.4, 0.1), 1: scores(0.2, 0.2)})
    assert report["mean"]["rdpo"]["hallucinated_mentions"] == pytest.approx(0.15)
    change = report["change"]["rdpo"]
    assert change["reduction"] == pytest.approx(0.5)
    assert change["reductions"] == {"0": pytest.approx(0.75), "1": pytest.approx(0.0)}
    assert BEFORE not in report["change"]


@pytest.mark.parametrize(
    ("before", "after", "recall", "holds"),
    [
        (0.40, 0.27, (0.80, 0.79), True),
        (0.40, 0.29, (0.80, 0.80), False),  # too little fewer
        (0.40, 0.10, (0.80, 0.77), False),  # by saying less
        (0.00, 0.00, (0.80, 0.80), False),  # nothing to reduce
    ],
)
def test_fewer_mentions_count_only_with_recall(before, after, recall, holds):
    assert summarize({0: scores(before, after, recall)})["change"]["rdpo"]["holds"] is holds


def test_the_table_shows_means_and_seeds():
    report = summarize({0: scores(0.4, 0.1, (0.8, 0.9)), 7: scores(0.2, 0.2, (0.8, 0.8))})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in format_table(report).splitlines()]
    assert lines[0] == ["mean of seeds 0, 7", BEFORE, "rdpo"]
    assert lines[1] == ["---"] * 3
    at = [line[0] for line in lines].index(SHOWN["hallucinated_mentions"])
    assert lines[at : at + 3] == [
        [SHOWN["hallucinated_mentions"], "0.300", "0.150"],
        ["- seed 0", "0.400", "0.100"],
        ["- seed 7", "0.200", "0.200"],
    ]
    assert lines[-2:] == [["fewer mentions of what is not there", "", "+50%"], ["recall gained", "", "+0.050"]]
    assert json.loads(json.dumps(report)) == report
