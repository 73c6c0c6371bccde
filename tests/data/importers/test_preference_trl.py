"""TRL's preference rows in their published variants, hand-written."""

import json

import pytest

from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import Drop, ImportProblem, Record
from mllm.data.reading.read import read_records
from mllm.data.schema import parse_row
from mllm.data.sources import Source

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def user(content):
    return {"role": "user", "content": content}


def says(content):
    return {"role": "assistant", "content": content}


EXPLICIT = {
    "images": ["demo/cat.jpg"],
    "prompt": [user([IMAGE, text("What animal is this?")])],
    "chosen": [says([text("A cat.")])],
    "rejected": [says([text("A dog on a sofa.")])],
}
GOLDEN = {
    "id": "00000000",
    "messages": [user([IMAGE, text("What animal is this?")])],
    "media": [{"kind": "image", "path": "demo/cat.jpg"}],
    "chosen": {"content": "A cat."},
    "rejected": {"content": "A dog on a sofa."},
}


def convert(row):
    (row,) = IMPORTERS["preference_trl"].convert(Record(row, "f", 0), Source("f"))
    return row


def implicit(row):
    rest = {key: value for key, value in row.items() if key != "prompt"}
    return rest | {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}


VARIANTS = {
    "explicit, parts": EXPLICIT,
    "implicit, parts": implicit(EXPLICIT),
    "explicit, strings": {
        "image": "demo/cat.jpg",  # one, not in a list
        "prompt": [user("What animal is this?")],
        "chosen": [says("A cat.")],
        "rejected": [says("A dog on a sofa.")],
    },
    "implicit, with the prompt as a text beside it": {
        **implicit({**EXPLICIT, "prompt": [user("What animal is this?")]}),
        "prompt": "What animal is this?",
    },
    "all texts": {
        "images": ["demo/cat.jpg"],
        "prompt": "What animal is this?",
        "chosen": "A cat.",
        "rejected": "A dog on a sofa.",
    },
    "all texts, with a string for the image": {
        "image": "demo/cat.jpg",
        "prompt": "<image>\nWhat animal is this?",
        "chosen": "A cat.",
        "rejected": "A dog on a sofa.",
    },
    "the keys that Arrow adds": {
        **EXPLICIT,
        "prompt": [
            user([{"type": "image", "text": None}, {"type": "text", "text": "What animal is this?", "index": None}])
        ],
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_are_one_row(name, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(VARIANTS[name]) + "\n")
    source = Source(path)
    records = list(read_records(source))
    importer = detect_format(records, source)
    assert importer.name == "preference_trl"
    (row,) = importer.convert(records[0], source)
    assert row == GOLDEN
    parse_row(row, where="f", root=tmp_path)


def test_images_come_before_the_first_message_of_the_user():
    talk = [{"role": "system", "content": "Be short."}, user("Who? <image>"), says("Ann."), user("And there?")]
    row = convert({"images": ["1.jpg", "2.jpg"], "prompt": talk, "chosen": [says("Bob.")], "rejected": [says("Eve.")]})
    assert row["messages"][1]["content"] == [IMAGE, IMAGE, text("Who? <image>")]
    assert [row["messages"][place] for place in (0, 2, 3)] == [talk[0], talk[2], talk[3]]


def test_a_part_further_on_keeps_its_image():
    talk = [user("Hello."), says("Hi."), user([IMAGE, text("What animal is this?")])]
    row = convert({**EXPLICIT, "prompt": talk})
    assert row["messages"] == talk and len(row["media"]) == 1


def test_text_alone_keeps_its_strings():
    row = convert({"images": [], "prompt": "Is <image> a tag?", "chosen": "Yes.", "rejected": "No.", "score": 3})
    assert row["messages"] == [user([text("Is <image> a tag?")])] and row["media"] == []
    assert row["meta"] == {"score": 3}


def test_a_video():
    row = convert({"video": "v.mp4", "prompt": "<video>\nWhat?", "chosen": "Rain.", "rejected": "Snow."})
    assert row["messages"] == [user([{"type": "video"}, text("What?")])]
    assert row["media"] == [{"kind": "video", "path": "v.mp4"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "chosen answer|no message of the user"),
        ({"chosen": "A cat.", "rejected": "A dog.", "prompt": None}, "two texts without a prompt"),
        ({"chosen": [says("A"), says("B")]}, "expected one message"),
        ({"chosen": [user("A cat.")]}, "chosen ends with a message of the user"),
        ({"chosen": [says([IMAGE])]}, "types \\[image\\]; expected text alone"),
        ({"rejected": [says(" ")]}, "rejected = ' '"),
        ({"prompt": [user([{"type": "audio"}])]}, "a part .*audio"),
        ({"prompt": [user(3)]}, "content = 3"),
        ({"prompt": "<image><image> What?", "chosen": "A", "rejected": "B"}, "2 strings <image>"),
    ],
)
def test_malformed(changes, message):
    with pytest.raises(ImportProblem, match=message):
        convert({**EXPLICIT, **changes})


def test_prompts_that_differ():
    row = implicit(EXPLICIT)
    row["rejected"] = [user([IMAGE, text("Which animal?")]), says("A dog.")]
    with pytest.raises(ImportProblem, match="different prompts"):
        convert(row)


def test_the_same_answer_twice():
    with pytest.raises(Drop, match="both answers are the same"):
        convert({**EXPLICIT, "rejected": EXPLICIT["chosen"]})


def test_an_image_without_a_place_is_found_by_the_checks_of_a_row(tmp_path):
    with pytest.raises(ValueError, match="0 media content items"):
        parse_row(convert({**EXPLICIT, "prompt": [user([text("What?")])]}), where="f", root=tmp_path)


OTHER_FORMS = [
    {"messages": [user("Hi")], "rejected_response": "No."},
    {"conversations": [], "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}},
    {"id": "1", "messages": [user("Hi")], "chosen": {"content": "A"}, "rejected": {"content": "B"}},
    {"image": "1.jpg", "question": "What?", "chosen": "A", "rejected": "B"},
    {"img_path": "1.jpg", "prompt": "What?", "chosen": "A", "rejected": "B"},
    {
        "image": "1.jpg",
        "retrieved_image": "2.jpg",
        "chosen": [user("a"), says("b")],
        "rejected": [user("a"), says("c")],
    },
    {"prompt": "What?", "completions": [], "img_path": "1.jpg"},
    {"chosen": "A", "rejected": "B"},
    ["a"],
]


@pytest.mark.parametrize("fields", OTHER_FORMS)
def test_other_forms_are_not_taken_for_it(fields):
    assert not IMPORTERS["preference_trl"].matches(fields, Source("f"))
