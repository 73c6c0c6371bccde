"""AudioCaps, Clotho, WavCaps and OpenAQA."""

import json

import pytest

from mllm.data.importers.base import Drop, ImportProblem
from mllm.errors import OptionError

AUDIOCAPS = "audiocap_id,youtube_id,start_time,caption\n91139,r1nicOVtvkQ,130,A woman talks nearby as water pours\n"
CLOTHO = (
    "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    'Rain on a roof.wav,"Rain falls, softly.",Two.,Three.,Four.,Five.\n'
)
SOUND = {"title": "Bell", "id": "2219", "duration": 14.1, "caption": "A bell rings.", "href": "x.html"}
OPENAQA = {
    "instruction": "What is heard?",
    "input": "",
    "audio_id": "audioset/audio/a.flac",
    "dataset": "as_strong_train",
    "task": "open-ended question",
    "output": "A dog.",
}


def _question_and_answer(row):
    assert row.messages[0]["content"][0] == {"type": "audio"}
    return row.messages[0]["content"][1]["text"], row.messages[1]["content"]


def test_audiocaps(import_rows):
    (row,) = import_rows(AUDIOCAPS, "train.csv")
    assert row.id == "91139" and row.media[0].path.name == "r1nicOVtvkQ.wav" and row.media[0].start is None
    assert _question_and_answer(row) == ("Describe the sound.", "A woman talks nearby as water pours")
    options = {"file": "{youtube_id}_{start_time}.flac", "question": "What is heard?", "whole_files": True}
    (row,) = import_rows(AUDIOCAPS, "train.csv", options=options)
    assert row.media[0].path.name == "r1nicOVtvkQ_130.flac" and (row.media[0].start, row.media[0].end) == (130, 140)
    assert _question_and_answer(row)[0] == "What is heard?"


def test_clotho_makes_five_rows_or_one(import_rows):
    rows = import_rows(CLOTHO, "development.csv")
    assert [row.id for row in rows] == [f"Rain on a roof.wav/{number}" for number in range(5)]
    assert [_question_and_answer(row)[1] for row in rows] == [
        "Rain falls, softly.",
        "Two.",
        "Three.",
        "Four.",
        "Five.",
    ]
    assert {row.media[0].path.name for row in rows} == {"Rain on a roof.wav"}
    (row,) = import_rows(CLOTHO, "development.csv", options={"captions": "first"})
    assert row.id == "Rain on a roof.wav"
    with pytest.raises(OptionError, match="captions = 'some'"):
        import_rows(CLOTHO, "development.csv", options={"captions": "some"})


def test_wavcaps(import_rows):
    sounds = [SOUND, SOUND | {"id": "Yb0RFKhbpFJA.wav"}, SOUND | {"id": "3", "audio": "waves/3.wav"}]
    rows = import_rows({"num_captions_per_audio": 1, "data": sounds})
    assert [row.media[0].path.name for row in rows] == ["2219.flac", "Yb0RFKhbpFJA.flac", "3.wav"]
    assert _question_and_answer(rows[0]) == ("Describe the sound.", "A bell rings.")
    assert rows[0].meta == {"title": "Bell", "duration": 14.1, "href": "x.html"}


def test_wavcaps_with_several_captions(import_rows):
    sound = {"id": "1", "duration": 3.0, "caption_1": "One.", "caption_2": "Two.", "audio": "1.wav"}
    rows = import_rows({"num_captions_per_audio": 2, "data": [sound]})
    assert [(row.id, _question_and_answer(row)[1]) for row in rows] == [("1/0", "One."), ("1/1", "Two.")]


def test_wavcaps_leaves_out_test_sounds_and_long_ones(import_rows, tmp_path):
    (tmp_path / "black.json").write_text(json.dumps({"FreeSound": ["7"], "AudioSet": []}))
    with pytest.raises(Drop, match="excluded"):
        import_rows({"data": [SOUND | {"id": "7"}]}, options={"exclude": str(tmp_path / "black.json")})
    with pytest.raises(Drop, match="longer than 10 seconds"):
        import_rows({"data": [SOUND]}, options={"max_seconds": 10})
    with pytest.raises(OptionError, match="exclude: "):
        import_rows({"data": [SOUND]}, options={"exclude": str(tmp_path / "none.json")})
    assert len(import_rows({"data": [SOUND]}, options={"max_seconds": 15})) == 1


def test_openaqa(import_rows):
    first, second = import_rows([OPENAQA, OPENAQA | {"input": "Choose: dog, cat."}])
    assert _question_and_answer(first) == ("What is heard?", "A dog.")
    assert first.media[0].path.as_posix().endswith("audioset/audio/a.flac")
    assert first.meta == {"dataset": "as_strong_train", "task": "open-ended question"}
    assert _question_and_answer(second)[0] == "What is heard?\nChoose: dog, cat."
    with pytest.raises(ImportProblem, match="audio_id = None; expected one file"):
        import_rows([OPENAQA | {"audio_id": None}])
