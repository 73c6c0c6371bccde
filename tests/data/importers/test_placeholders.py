import pytest

from mllm.data.importers.base import ImportProblem
from mllm.data.importers.placeholders import fill

A, B, V = {"kind": "image", "path": "a"}, {"kind": "image", "path": "b"}, {"kind": "video", "path": "v"}
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def test_strings_become_items_and_media_come_in_order_of_appearance():
    contents, media = fill(["<image>\nOne <video>two", "none", "<image>"], {"image": [A, B], "video": [V]})
    assert contents == [
        [IMAGE, {"type": "text", "text": "One "}, VIDEO, {"type": "text", "text": "two"}],
        "none",
        [IMAGE],
    ]
    assert media == [A, V, B]


def test_strings_of_a_kind_without_media_are_text():
    contents, media = fill(["<image> and <video>"], {"image": [], "video": [V]})
    assert contents == [[{"type": "text", "text": "<image> and "}, VIDEO]] and media == [V]
    assert fill(["<image>"], {"image": []}) == (["<image>"], [])


def test_only_one_newline_belongs_to_a_string():
    assert fill(["<image>\n\nText"], {"image": [A]})[0] == [[IMAGE, {"type": "text", "text": "\nText"}]]


@pytest.mark.parametrize("text", ["no string", "<image><image>", ""])
def test_more_or_fewer_strings_than_media_are_a_problem(text):
    with pytest.raises(ImportProblem, match="strings <image> in the texts and 1 images; expected one string for each"):
        fill([text], {"image": [A]})
