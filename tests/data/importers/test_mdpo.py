"""mDPO's JSON, from a hand-written miniature of its sample file."""

import json

import pytest

from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import ImportProblem, Record
from mllm.data.importers.mdpo import VICUNA_SYSTEM
from mllm.data.reading.read import read_records
from mllm.data.sources import Source

ROW = {
    "img_path": "images/llava-1.jpg",
    "prompt": f"{VICUNA_SYSTEM} USER: <image>\nWhy do they\nsmile? ASSISTANT:",
    "chosen": "It is a birthday.",
    "rejected": "It rains.",
}


def convert(**changes):
    (row,) = IMPORTERS["mdpo"].convert(Record({**ROW, **changes}, "f", 0), Source("f"))
    return row


def test_the_published_json(tmp_path):
    path = tmp_path / "sample_data.json"
    path.write_text(json.dumps([ROW]))
    source = Source(path)
    records = list(read_records(source))
    importer = detect_format(records, source)
    assert importer.name == "mdpo"
    assert list(importer.convert(records[0], source)) == [
        {
            "id": "00000000",
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why do they\nsmile?"}]}
            ],
            "media": [{"kind": "image", "path": "images/llava-1.jpg"}],
            "chosen": {"content": "It is a birthday."},
            "rejected": {"content": "It rains."},
        }
    ]


def test_another_system_prompt_is_kept_and_a_bare_question_is_one():
    row = convert(prompt="Be short. USER: <image>\nWhy? ASSISTANT: ")
    assert row["messages"][0] == {"role": "system", "content": "Be short."}
    row = convert(prompt="<image>\nWhy?")
    assert row["messages"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<|im_start|>user\n<image>\nWhy?<|im_end|>", "expected Vicuna's template"),
        ("USER: <image>\nWhy? ASSISTANT: So. USER: And? ASSISTANT:", "several turns"),
        ("USER: <image>\nWhy?", "several turns"),
        ("USER: Why? ASSISTANT:", "0 strings <image>"),
        ("USER: <image><image> Why? ASSISTANT:", "2 strings <image> in the texts and 1 images"),
        ("", "prompt = ''"),
    ],
)
def test_other_prompts(prompt, message):
    with pytest.raises(ImportProblem, match=message):
        convert(prompt=prompt)
