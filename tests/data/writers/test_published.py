"""A published file -> rows -> our file of that form -> the same rows: the files differ in spelling alone."""

import json

import pytest

from mllm.data.writers.llama_factory import write_llama_factory
from mllm.data.writers.llava import write_llava
from mllm.data.writers.ms_swift import write_ms_swift

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
LLAVA = [
    {"id": 7, "image": "images/0.png", "conversations": TURNS},
    {"image": ["images/0.png"], "conversations": [{"from": "human", "value": "What?\n<image>"}, TURNS[1]]},
    {"id": "text", "conversations": [{"from": "human", "value": "What is <image>?"}, TURNS[1]], "model": "x"},
]
ALPACA = [
    {"instruction": "<image>\nWhat?", "input": "Be brief.", "output": "A cat.", "pictures": "images/0.png", "h": []},
    {"instruction": "Count.", "output": "Two.", "h": [["Begin.", "One."]], "system": "Be brief."},
]
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "h", "system": "system"}
ASK = {"role": "user", "content": "<image>\nWhat?"}
BOX = {"role": "assistant", "content": "<ref-object> <bbox>", "loss": True}
OBJECTS = {"ref": ["a cat"], "bbox": [[1, 2, 3.5, 4]]}
SWIFT = [
    {"messages": [ASK, {"role": "assistant", "content": "A cat."}], "images": "images/0.png"},
    {"messages": [ASK, BOX], "images": ["images/1.png"], "objects": OBJECTS},
]


def _llava(rows, root):
    write_llava(rows, root / "again.json")
    return root / "again.json"


def _swift(rows, root):
    write_ms_swift(rows, root / "again.jsonl")
    return root / "again.jsonl"


def _llama_factory(rows, root):
    write_llama_factory(rows, root, name="again")
    return root / "again.json"


@pytest.mark.parametrize(
    ("name", "published", "write"),
    [("data.json", LLAVA, _llava), ("data.jsonl", SWIFT, _swift), ("data.json", ALPACA, _llama_factory)],
    ids=["llava", "ms_swift", "llama_factory"],
)
def test_published_files_keep_their_rows(name, published, write, images, tmp_path, read_rows, normal):
    if published is ALPACA:
        entry = {"file_name": name, "columns": COLUMNS | {"images": "pictures"}}
        (tmp_path / "dataset_info.json").write_text(json.dumps({"published": entry}))
    lines = "".join(json.dumps(record) + "\n" for record in published)
    (tmp_path / name).write_text(lines if name.endswith("l") else json.dumps(published))
    rows = read_rows(tmp_path / name)
    again = read_rows(write(rows, tmp_path))
    assert len(rows) == len(published)
    assert [normal(row) for row in again] == [normal(row) for row in rows]
