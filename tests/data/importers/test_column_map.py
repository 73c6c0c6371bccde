import pytest

from mllm.data.importers.base import ImportProblem
from mllm.data.indexing.index import open_index
from mllm.data.schema import PreferenceRow, has_target_media
from mllm.data.sources import Source
from mllm.errors import OptionError

QA = {"question": "ask", "answer": "reply"}
RECORD = {"ask": "What?", "reply": "A cat.", "pic": "a.png", "split": "train"}


@pytest.fixture
def mapped(import_rows):
    def run(record, columns, **options):
        return import_rows([record], format="column_map", columns=columns, options=options)

    return run


def test_media_come_first_where_no_string_names_their_place(mapped):
    (row,) = mapped(RECORD, QA | {"image": "pic"})
    assert row.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert row.media[0].path.name == "a.png" and row.meta == {"split": "train"} and row.id == "00000000"


def test_strings_name_places(mapped):
    (row,) = mapped(RECORD | {"ask": "Is <image> a cat?", "key": "x"}, QA | {"image": "pic", "id": "key"})
    assert [item["type"] for item in row.messages[0]["content"]] == ["text", "image", "text"] and row.id == "x"


def test_images_of_the_answer_are_targets(mapped):
    columns = QA | {"image": "pic", "output_images": "out", "rationale": "why", "system": "sys"}
    record = RECORD | {"out": ["b.png", "c.png"], "why": "First <image>.", "reply": "Then <image>.", "sys": "Draw."}
    (row,) = mapped(record, columns)
    assert has_target_media(row) and [item.path.name for item in row.media] == ["a.png", "b.png", "c.png"]
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant"]
    assert row.messages[2]["content"] == [
        {"type": "text", "text": "First "},
        {"type": "image"},
        {"type": "text", "text": ".\n\nThen "},
        {"type": "image"},
        {"type": "text", "text": "."},
    ]
    (row,) = mapped(RECORD | {"out": "b.png"}, QA | {"output_images": "out"})
    assert row.messages[1]["content"] == [{"type": "text", "text": "A cat."}, {"type": "image"}]


def test_a_list_of_messages(mapped):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "What?"},
        {"from": "gpt", "value": "A cat."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "There."},
    ]
    (row,) = mapped({"talk": turns, "clip": "v.mp4"}, {"messages": "talk", "video": "clip"})
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert row.messages[0]["content"] == "Be brief."
    assert row.messages[1]["content"] == [{"type": "video"}, {"type": "text", "text": "What?"}]


def test_a_pair(mapped):
    record = RECORD | {"good": "A cat.", "bad": "A dog.", "near": "b.png"}
    (row,) = mapped(
        record, {"question": "ask", "chosen": "good", "rejected": "bad", "image": "pic", "contrast": "near"}
    )
    assert isinstance(row, PreferenceRow) and row.contrast[0].path.name == "b.png"
    assert (row.chosen.content, row.rejected.content) == ("A cat.", "A dog.")


def test_words_without_media_stay_words(mapped):
    (row,) = mapped(RECORD | {"ask": "What is <image>?"}, QA)
    assert row.messages[0]["content"] == "What is <image>?" and row.media == ()


def test_a_misspelt_column_is_a_problem_that_names_the_columns_seen(mapped):
    with pytest.raises(ImportProblem, match="no column for image: imge; the columns are ask, reply, pic, split"):
        mapped(RECORD, QA | {"image": "imge"})
    (row,) = mapped(RECORD, QA | {"image": "imge"}, optional=["image"])
    assert row.media == ()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "say where nothing is; the columns are ask, reply, pic, split"),
        ({"question": "ask"}, "say where question is"),
        (QA | {"chosen": "reply"}, "chosen"),
        (QA | {"picture": "pic"}, "columns: picture"),
    ],
)
def test_maps_that_cannot_work(mapped, columns, message):
    with pytest.raises(OptionError, match=message):
        mapped(RECORD, columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ask": None}, "question = None"),
        ({"ask": "<image><image>"}, "2 strings <image> in the texts and 1 images"),
        ({"pic": 3}, "image = 3"),
    ],
)
def test_problems(mapped, change, message):
    with pytest.raises(ImportProblem, match=message):
        mapped(RECORD | change, QA | {"image": "pic"})


def test_what_a_source_says_of_all_its_rows(tmp_path):
    (tmp_path / "set.jsonl").write_text('{"ask": "Where?", "reply": "[0.1, 0.2, 0.3, 0.4]"}\n')
    source = Source(tmp_path / "set.jsonl", format="column_map", columns=QA, coordinates="unit")
    (row,) = open_index(source, cache_dir=tmp_path / "cache")
    assert (row.coordinates, row.source) == ("unit", "set")
