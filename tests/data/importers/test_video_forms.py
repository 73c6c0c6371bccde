"""VideoChat, Video-LLaMA and VideoInstruct."""

import pytest

from mllm.data.importers.base import ImportProblem

PAIR = {"i": "", "q": "What is done?", "a": "A dog runs."}


def _texts(row):
    return [(message["role"], message["content"]) for message in row.messages]


def test_video_llama(import_rows):
    (row,) = import_rows([{"video": "v.mp4", "QA": [{"q": "Who?", "a": "A dog."}, {"q": "Where?", "a": "Outside."}]}])
    assert _texts(row) == [
        ("user", [{"type": "video"}, {"type": "text", "text": "Who?"}]),
        ("assistant", "A dog."),
        ("user", "Where?"),
        ("assistant", "Outside."),
    ]
    assert row.media[0].kind == "video" and row.media[0].path.name == "v.mp4"


def test_videochat2_instruction_is_the_system_message(import_rows):
    pairs = [PAIR | {"i": "Watch."}, PAIR | {"i": "Watch."}, PAIR | {"i": "Count."}]
    (row,) = import_rows([{"video": "v.mp4", "start": 2, "end": 9.5, "QA": pairs}])
    assert _texts(row)[0] == ("system", "Watch.")
    assert [text for role, text in _texts(row) if role == "user"][1:] == ["What is done?", "Count.\nWhat is done?"]
    assert (row.media[0].start, row.media[0].end) == (2.0, 9.5)


def test_videochat2_captions_have_no_question(import_rows):
    (row,) = import_rows([{"image": "a.jpg", "QA": [{"i": "Describe the image.", "q": "", "a": "A dog."}]}])
    assert _texts(row)[1] == ("user", [{"type": "image"}]) and row.media[0].kind == "image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"QA": []}, "no questions"),
        ({"video": ""}, "neither `video` nor `image`"),
        ({"QA": ["x"]}, "QA holds 'x'"),
        ({"QA": [PAIR, PAIR | {"q": ""}]}, "question 1 of QA is empty"),
        ({"QA": [PAIR | {"a": ""}]}, "a = ''"),
        ({"QA": [PAIR | {"q": 3}]}, "q = 3"),
        ({"start": "soon"}, "start = 'soon'"),
    ],
)
def test_videochat_problems(import_rows, change, message):
    with pytest.raises(ImportProblem, match=message):
        import_rows([{"video": "v.mp4", "QA": [PAIR]} | change], format="videochat")


def test_videoinstruct(import_rows):
    records = [
        {"q": "What happens?", "a": "A dog runs.QA_GT_caption_based_noisy", "video_id": "v_1"},
        {"q": "What does <video> mean?", "a": "It is a word.", "video_id": "v_2"},
    ]
    first, second = import_rows(records)
    assert _texts(first)[0][1] == [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    assert _texts(first)[1] == ("assistant", "A dog runs.") and first.media[0].path.name == "v_1.mp4"
    assert _texts(second)[0][1][1]["text"] == "What does <video> mean?"
    (row,) = import_rows(records[:1], options={"file": "clips/{video_id}.mkv"})
    assert row.media[0].path.as_posix().endswith("clips/v_1.mkv")
    with pytest.raises(ImportProblem, match="a = ''"):
        import_rows([records[0] | {"a": "QA_GT_caption_based_noisy"}])
    with pytest.raises(ImportProblem, match=r"no file name by the pattern '\{id\}' .*the record has q, a, video_id"):
        import_rows(records[:1], options={"file": "{id}"})
