"""What answers name that is not there, against values worked out by hand."""

import runpy
from pathlib import Path

import pytest

from mllm.evaluation.digits import score
from mllm.evaluation.hallucination import COLOURS, Named, compare, hallucination, names_in

SCENE = {"digits": [5, 3, 5], "colours": ["red", "blue", "red"], "places": ["top left", "top right", "bottom right"]}


def rows_of(task, *answers):
    return [{"meta": {"task": task, **SCENE, "answer": answer}} for answer in answers]


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("There is a red 5 in the top left and a blue 3 in the top right.", Named(2, 0, 2, 0, there=4, found=4)),
        # Wrong places and wrong pairs are no business of this file.
        ("There is a blue 5 in the middle left.", Named(1, 0, 1, 0, 4, 2)),
        ("There is a green 7 in the top left.", Named(1, 1, 1, 1, 4, 0)),
        # Each mention counts, what is found only once.
        ("A red 5, a red 5, a red 9 and a red 9.", Named(4, 2, 4, 0, 4, 2)),
        ("A green 5, a green 5.", Named(2, 0, 2, 2, 4, 1)),
        # A number of two digits is no digit of the picture, a colour that the world lacks is none of it.
        ("There is a pink 53.", Named(1, 1, 1, 1, 4, 0)),
        ("Reddish things, 5th of their kind; a blueberry.", Named(1, 0, 0, 0, 4, 1)),
        ("RED 5", Named(1, 0, 1, 0, 4, 2)),
        ("Nothing.", Named(0, 0, 0, 0, 4, 0)),
        ("", Named(0, 0, 0, 0, 4, 0)),
    ],
)
def test_a_caption_is_held_against_its_scene(caption, found):
    assert compare(caption, SCENE) == found


def test_names_are_read_in_order():
    assert names_in("An orange 0, grey 12 and White 7 in the top left.") == ["orange", "0", "grey", "12", "white", "7"]


def test_captions_are_counted_by_caption_and_by_mention():
    answers = ["There is a red 5.", "There is a green 5 and a blue 7.", "A white 8.", "", "A white 5."]
    assert hallucination("caption", answers, rows_of("caption", *[""] * 5)) == {
        "hallucinated_captions": pytest.approx(3 / 5),
        "hallucinated_mentions": pytest.approx(5 / 10),
        "hallucinated_digits": pytest.approx(2 / 5),
        "hallucinated_colours": pytest.approx(3 / 5),
        "mentioned_recall": pytest.approx((2 + 2 + 0 + 0 + 1) / 20),
        "mentions": pytest.approx(10 / 5),
    }


def test_silence_hallucinates_nothing_and_recalls_nothing():
    found = hallucination("caption", ["", ""], rows_of("caption", "", ""))
    assert set(found.values()) == {0.0}


def test_presence_is_scored_as_a_search_for_yes():
    rows = rows_of("presence", "yes", "yes", "yes", "no", "no", "no")
    found = hallucination("presence", ["yes", " yes\n", "no", "yes", "maybe", "no"], rows)
    # Two of three found; four claims, "maybe" among them: it is neither a yes of the share nor a no.
    assert found == {
        "presence_precision": pytest.approx(2 / 4),
        "presence_recall": pytest.approx(2 / 3),
        "presence_f1": pytest.approx(2 * 2 / (4 + 3)),
        "presence_yes_share": pytest.approx(3 / 6),
    }


@pytest.mark.parametrize("answers", [["yes", "no", "yes"], ["no", "no", "no"], ["yes", "yes", "yes"], ["", "a", "no"]])
def test_f1_is_the_mean_of_precision_and_recall(answers):
    """Harmonic, and the very figure that `score` gives."""
    rows = rows_of("presence", "yes", "no", "yes")
    found = hallucination("presence", answers, rows)
    precision, recall = found["presence_precision"], found["presence_recall"]
    harmonic = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert found["presence_f1"] == pytest.approx(harmonic) == score("presence", answers, rows)["presence_f1"]


def test_nothing_can_be_named_in_other_tasks():
    assert hallucination("count", ["3"], rows_of("count", "3")) == {}


def test_as_many_answers_as_rows():
    with pytest.raises(ValueError, match="1 answers for 2 rows"):
        hallucination("caption", ["a red 5"], rows_of("caption", "", ""))
    with pytest.raises(ValueError, match="0 answers for 0 rows"):
        hallucination("count", [], [])


def test_the_colours_are_those_of_the_recipe():
    recipe = runpy.run_path(str(Path(__file__).parents[2] / "data_recipes" / "digits.py"))
    assert set(recipe["COLOURS"]) == COLOURS
