"""The scores of the digits world, against values worked out by hand."""

import pytest

from mllm.evaluation.digits import METRICS, TASKS_OF, Counts, best_constant, score, score_caption

SCENE = {
    "digits": [5, 3, 0],
    "colours": ["red", "blue", "orange"],
    "places": ["top left", "middle centre", "bottom right"],
}
CAPTION = "There is a red 5 in the top left, a blue 3 in the middle centre and an orange 0 in the bottom right."


def rows_of(task, *answers):
    return [{"meta": {"task": task, **SCENE, "answer": answer}} for answer in answers]


@pytest.mark.parametrize(
    ("answer", "counts"),
    [
        (CAPTION, Counts(things=3, mentions=3, placed=3, right=3, coloured=3)),
        ("There is a red 5 in the top left.", Counts(3, 1, 1, 1, 1)),
        ("There is a green 5 in the top left and a blue 4 in the middle centre.", Counts(3, 2, 2, 1, 0)),
        ("There is a red 5 in the top right.", Counts(3, 1, 0, 0, 0)),
        ("There is a red 5 in the top left and a red 5 in the top left.", Counts(3, 2, 1, 1, 1)),
        ("There is a red 6 in the top left and a red 5 in the top left.", Counts(3, 2, 1, 0, 0)),
        ("There is a red 5 in the top left, a blue.", Counts(3, 2, 1, 1, 1)),
        ("There is a red 55 in the top left.", Counts(3, 1, 0, 0, 0)),
        ("a red 5 in the top left.", Counts(3, 1, 0, 0, 0)),
        ("There is a red 5 in the top left", Counts(3, 1, 0, 0, 0)),
        ("", Counts(3, 0, 0, 0, 0)),
    ],
)
def test_caption_counts(answer, counts):
    assert score_caption(answer, {**SCENE, "answer": CAPTION}) == counts


def test_caption_metrics_are_over_all_things_together():
    rows = rows_of("caption", CAPTION, CAPTION)
    found = score("caption", [CAPTION, "There is a green 5 in the top left and a red 9 in the top right."], rows)
    assert found == {
        "caption_digit_recall": pytest.approx(4 / 6),
        "caption_digit_precision": pytest.approx(4 / 5),
        "caption_color_accuracy": pytest.approx(3 / 4),
    }


@pytest.mark.parametrize(
    ("task", "references", "answers", "value"),
    [
        ("position", ["5", "3", "0", "1"], ["5", " 3\n", "A 0", "7"], 0.5),
        ("count", ["3", "2"], ["3", "3 digits"], 0.5),
        ("color", ["red", "blue"], ["red", "Blue"], 0.5),
        # 1 of 2 yes found; said yes twice: precision 1/2, recall 1/2
        ("presence", ["yes", "yes", "no", "no"], ["yes", "no", "yes", "no"], 0.5),
        # an answer that is no answer costs precision: precision 1/2, recall 1/1
        ("presence", ["yes", "no"], ["yes", "maybe"], 2 / 3),
        ("presence", ["yes", "no"], ["no", "no"], 0.0),
    ],
)
def test_short_answers_are_compared_exactly(task, references, answers, value):
    assert score(task, answers, rows_of(task, *references)) == {METRICS[task][0]: pytest.approx(value)}


def test_best_constant():
    assert best_constant("count", rows_of("count", "3", "2", "3", "1")) == {"count_accuracy": 0.5}
    assert best_constant("presence", rows_of("presence", "yes", "no")) == {"presence_f1": pytest.approx(2 / 3)}
    assert best_constant("caption", rows_of("caption", CAPTION))["caption_digit_recall"] == 1.0


def test_score_refuses_what_cannot_be_scored():
    with pytest.raises(ValueError, match="unknown task 'colour'"):
        score("colour", ["red"], rows_of("color", "red"))
    with pytest.raises(ValueError, match="1 answers for 2 rows"):
        score("count", ["1"], rows_of("count", "1", "2"))
    assert {task for tasks in TASKS_OF.values() for task in tasks} == set(METRICS)


@pytest.mark.parametrize("task", [*TASKS_OF["video"], *TASKS_OF["audio"]])
def test_answers_about_videos_and_sounds_are_compared_exactly(task):
    rows = [{"meta": {"task": task, "answer": answer}} for answer in ("left", "left", "3", "up")]
    assert score(task, ["left", " left\n", "3", "it goes up"], rows) == {METRICS[task][0]: 0.75}
    assert best_constant(task, rows) == {METRICS[task][0]: 0.5}
