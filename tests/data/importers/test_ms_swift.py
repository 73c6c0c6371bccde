import pytest

from mllm.data.importers.base import Drop, ImportProblem
from mllm.data.schema import PreferenceRow

ASK = {"role": "user", "content": "<image>What is it?"}
ANSWER = {"role": "assistant", "content": "A kite."}
ROW = {"messages": [ASK, ANSWER], "images": ["k.jpg"]}


@pytest.fixture
def swift(import_rows):
    return lambda *records, **source: import_rows(list(records), "data.jsonl", **source)


def _names(items):
    return [item.path.name for item in items]


def test_media_of_three_kinds_in_any_message(swift):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image><video>Does <audio>fit?"},
        {"role": "assistant", "content": "Yes: <image>"},
    ]
    (row,) = swift({"messages": messages, "images": ["a.jpg", "b.jpg"], "videos": ["v.mp4"], "audios": ["s.wav"]})
    assert _names(row.media) == ["a.jpg", "v.mp4", "s.wav", "b.jpg"]
    assert row.messages[2]["content"] == [{"type": "text", "text": "Yes: "}, {"type": "image"}]


def test_words_that_look_like_placeholders_stay_words(swift):
    ask = {"role": "user", "content": "What do <video> and <image> mean?"}
    text, shown = swift({"messages": [ask, ANSWER]}, ROW | {"messages": [ASK, {**ANSWER, "content": "Not <video>."}]})
    assert text.messages[0]["content"] == ask["content"] and text.media == ()
    assert shown.messages[1]["content"] == "Not <video>."


def test_loss_flags_and_weights(swift):
    answers = [{**ANSWER, "loss": False}, {**ANSWER, "loss": True}, {**ANSWER, "loss_scale": 0.5}, ANSWER]
    more = [{"role": "user", "content": "And?"}]
    messages = [ASK, answers[0], *more, answers[1], *more, answers[2], *more, answers[3]]
    (row,) = swift(ROW | {"messages": messages})
    assert [message.get("loss") for message in row.messages[1::2]] == [False, True, 0.5, None]


def test_what_is_not_of_the_form_is_kept_beside_it(swift):
    (row,) = swift(ROW | {"id": 3, "channel": "vqa", "solution": {"a": 1}})
    assert row.id == "3" and row.meta == {"channel": "vqa", "solution": {"a": 1}}


def test_objects_are_written_into_the_text(swift):
    messages = [
        {"role": "user", "content": "<image>Find the <ref-object>."},
        {"role": "assistant", "content": "<bbox> and <bbox>"},
    ]
    objects = {"ref": ["sheep"], "bbox": [[90.9, 160, 135, 212.75], [1, 2, 3, 4]]}
    pixel, unit = swift(
        {"messages": messages, "images": ["a.jpg"], "objects": objects},
        {
            "messages": messages,
            "images": ["a.jpg"],
            "objects": {"ref": ["cow"], "bbox": [[0, 0.25, 1, 0.5], [0.00001, 0, 0.5, 1]], "bbox_type": "norm1"},
        },
    )
    assert pixel.coordinates == "pixel" and unit.coordinates == "unit"
    assert pixel.messages[0]["content"][1]["text"] == "Find the sheep."
    assert pixel.messages[1]["content"] == "[90.9, 160, 135, 212.75] and [1, 2, 3, 4]"
    assert unit.messages[1]["content"] == "[0.0, 0.25, 1.0, 0.5] and [0.000010, 0.0, 0.5, 1.0]"


def test_a_box_belongs_to_the_image_before_it(swift):
    messages = [{"role": "user", "content": "<image><image>Where?"}, {"role": "assistant", "content": "<bbox>"}]
    record = {"messages": messages, "images": ["a.jpg", "b.jpg"]}
    (row,) = swift(record | {"objects": {"bbox": [[1, 2, 3, 4]], "image_id": [1]}})
    assert row.coordinates == "pixel"
    with pytest.raises(ImportProblem, match=r"box 0 is of image \[0\] and stands behind image 1"):
        swift(record | {"objects": {"bbox": [[1, 2, 3, 4]]}})


def test_a_rejected_response(swift):
    text, listed = swift(
        ROW | {"rejected_response": "A plane."},
        ROW | {"rejected_response": [{"role": "assistant", "content": "A bird."}], "margin": 0.5},
    )
    assert isinstance(text, PreferenceRow) and text.messages[-1]["role"] == "user"
    assert (text.chosen.content, text.rejected.content, text.rejected.media) == ("A kite.", "A plane.", None)
    assert listed.rejected.content == "A bird." and listed.meta == {"margin": 0.5}


def test_the_same_answer_under_another_image(swift):
    (row,) = swift(ROW | {"rejected_images": ["other.jpg"]})
    assert row.chosen.content == row.rejected.content == "A kite."
    assert _names(row.media) == ["k.jpg"] and _names(row.rejected.media) == ["other.jpg"] and row.contrast is None


def test_a_whole_rejected_side(swift):
    rejected = {"rejected_messages": [ASK, {**ANSWER, "content": "A plane."}], "rejected_images": ["k.jpg"]}
    same_image, other_image = swift(ROW | rejected, ROW | rejected | {"rejected_images": ["other.jpg"]})
    assert same_image.rejected.content == "A plane." and same_image.rejected.media is None
    assert _names(other_image.rejected.media) == ["other.jpg"]
    with pytest.raises(ImportProblem, match="differ before the answer"):
        swift(ROW | rejected | {"rejected_messages": [{**ASK, "content": "<image>Where?"}, ANSWER]})


def test_a_rejected_side_keeps_the_places_of_mixed_media(swift):
    ask = {"role": "user", "content": "<image>, <video>, <image>?"}
    record = {"messages": [ask, ANSWER], "images": ["a.jpg", "b.jpg"], "videos": ["v.mp4"]}
    (row,) = swift(record | {"rejected_images": ["c.jpg", "d.jpg"]})
    assert _names(row.rejected.media) == ["c.jpg", "v.mp4", "d.jpg"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tools": "[]"}, "tools"),
        ({"messages": [ASK, {"role": "tool_call", "content": "{}"}, ANSWER]}, "tools"),
        ({"label": False}, "label"),
        ({"rejected_response": "A kite."}, "the same"),
    ],
)
def test_what_is_not_learned_from_is_counted(swift, change, reason):
    with pytest.raises(Drop, match=reason):
        swift(ROW | change, format="ms_swift")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, None),
        ({"images": ["a", "b"]}, "1 strings <image> in the texts and 2 images"),
        ({"messages": []}, "no `messages`"),
        ({"messages": [ASK, {**ANSWER, "content": [{"type": "text", "text": "x"}]}]}, "expected a string"),
        ({"rejected_images": ["a", "b"]}, "2 rejected_images and 1 images"),
        ({"rejected_response": 3}, "rejected_response = 3"),
        ({"rejected_response": "x", "messages": [ASK]}, "messages end with the user"),
        ({"objects": {"bbox": [[1, 2, 3, 4]]}}, "0 <bbox> in the texts, 0 ref and 1 bbox"),
        ({"objects": {"bbox": [[1, 2]]}, "messages": [ASK, {**ANSWER, "content": "<bbox>"}]}, "four numbers"),
        (
            {
                "objects": {"bbox": [[1, 2, 3, 4]], "bbox_type": "x"},
                "messages": [ASK, {**ANSWER, "content": "<bbox>"}],
            },
            "bbox_type = 'x'",
        ),
    ],
)
def test_problems(swift, change, message):
    if message is None:  # words, then
        assert swift(ROW | change, format="ms_swift")[0].messages[0]["content"] == ASK["content"]
        return
    with pytest.raises(ImportProblem, match=message):
        swift(ROW | change, format="ms_swift")
