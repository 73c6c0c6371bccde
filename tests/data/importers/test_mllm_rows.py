"""Our own rows: told from other forms, read from JSONL and from shards, and never bent."""

import json

import pytest

from mllm.data.importers.base import ImportProblem, Record
from mllm.data.importers.mllm_rows import IMPORTER
from mllm.data.indexing.index import open_index
from mllm.data.schema import parse_row
from mllm.data.sources import Source
from mllm.data.writers.columns import SCHEMA, cells_of, media_cell
from mllm.errors import OptionError

ASK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": "A kite."}
IMAGE = {"kind": "image", "path": "a.png"}
ROW = {"id": "r", "messages": [ASK, ANSWER], "media": [IMAGE]}
PAIR = {
    "id": "p",
    "messages": [ASK],
    "media": [IMAGE],
    "chosen": {"content": "Yes.", "media": [IMAGE | {"path": "b.png"}]},
    "rejected": {"content": "No."},
    "contrast": [IMAGE | {"path": "c.png"}],
    "meta": {"margin": 2},
}


@pytest.mark.parametrize(
    ("fields", "is_ours"),
    [
        (ROW, True),
        (ROW | {"media": []}, True),
        (PAIR, True),
        (ROW | {"extra": 1}, False),
        ({"messages": [ASK, ANSWER], "images": ["a.png"]}, False),
        (ROW | {"media": ["a.png"]}, False),
        ({"id": "r", "messages": [ANSWER]}, False),
        ({"id": "r", "messages": [], "chosen": [ANSWER], "rejected": [ANSWER]}, False),
        ([ROW], False),
        (None, False),
    ],
)
def test_what_is_ours(fields, is_ours):
    assert IMPORTER.matches(fields, Source("rows.jsonl")) is is_ours


def test_a_row_is_handed_on_as_it_is_with_what_the_source_says_of_all():
    source = Source("rows.jsonl", name="set", coordinates="unit")
    [fields] = IMPORTER.convert(Record({key: value for key, value in ROW.items() if key != "id"}, "line 3", 2), source)
    assert fields == ROW | {"id": "00000002", "source": "set", "coordinates": "unit"}
    [fields] = IMPORTER.convert(Record(ROW | {"source": "own", "coordinates": "pixel"}, "line 1", 0), source)
    assert (fields["source"], fields["coordinates"]) == ("own", "pixel")
    with pytest.raises(ImportProblem, match="a list; expected an object"):
        list(IMPORTER.convert(Record([], "line 1", 0), source))


@pytest.mark.parametrize("fields", [ROW, PAIR])
def test_cells_of_a_shard_give_the_row_they_were_made_of(fields, tmp_path):
    def media_of_side(side):
        return (fields.get(side) or {}).get("media", [])

    items = [*fields["media"], *media_of_side("chosen"), *media_of_side("rejected"), *fields.get("contrast", [])]
    row = parse_row(fields, where="here", root=tmp_path)
    item = row.media[0]
    cells = cells_of(row, [media_cell(item, path=entry["path"], data=None) for entry in items])
    assert set(cells) == set(SCHEMA.names)
    [back] = IMPORTER.convert(Record(cells, "here", 0), Source("rows.parquet"))
    assert parse_row(back, where="here", root=tmp_path) == row


@pytest.mark.parametrize(
    "change",
    [{"messages": "[{"}, {"contrast": "[9]"}, {"chosen": json.dumps({"content": "x", "media": [-1]})}],
)
def test_broken_cells_are_problems(change, tmp_path):
    row = parse_row(PAIR, where="here", root=tmp_path)
    cells = cells_of(row, [media_cell(row.media[0], path="a.png", data=None)] * 3) | change
    with pytest.raises(ImportProblem):
        list(IMPORTER.convert(Record(cells, "here", 0), Source("rows.parquet")))


def test_the_form_of_rows_of_text_alone_has_to_be_named(tmp_path):
    """They could be of another form that says the same: at least no row is lost silently."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "r", "messages": [{"role": "user", "content": "Why?"}, ANSWER]}) + "\n")
    named = open_index(Source(path, format="mllm"), cache_dir=tmp_path / "cache")
    assert named[0].messages[1] == ANSWER
    try:
        found = open_index(Source(path), cache_dir=tmp_path / "cache")
    except OptionError:
        return
    assert [message["role"] for message in found[0].messages] == ["user", "assistant"]
