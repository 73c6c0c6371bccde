"""UnifiedVisual's recipe on miniatures of its kinds of rows; the column names are made up, as they must be."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm.data.schema import has_target_media, parse_row
from mllm.errors import OptionError, RowError

IMAGE = {"type": "image"}
NAMES = ("question=ask", "answer=reply", "rationale=why")


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture
def build(tmp_path, convert):
    """Rows, and what recipe.json holds, of records of one set."""

    def run(part, records, *columns, **options):
        path = tmp_path / f"{part}.parquet"
        pq.write_table(pa.Table.from_pylist(records), path)
        out = tmp_path / f"{part}-rows"
        given = ["--columns", *columns] if columns else []
        facts = convert("unified_visual", path, out, "--part", part, "--on_missing", "keep", *given, **options)
        rows = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        return [parse_row(row, where="rows.jsonl", root=out) for row in rows], facts

    return run


def test_understanding(build):
    record = {"ask": "How many birds?", "why": "I count them.", "reply": "Three.", "pic": "LLaVA_CoT_subset/1.jpg"}
    (row,), facts = build("llava_cot", [record], *NAMES, "image=pic")
    assert row.messages[0]["content"] == [IMAGE, text("How many birds?")]
    assert row.messages[1] == {"role": "assistant", "content": [text("I count them.\n\n"), text("Three.")]}
    assert row.meta == {"rationale_items": 1, "set": "llava_cot", "needs_image_generation": False}
    assert not has_target_media(row) and facts["rows_with_target_media"] == 0
    assert row.source == "unified_visual/llava_cot"


def test_text_alone(build):
    record = {"ask": "Is <image> a tag?", "why": "HTML has img.", "reply": "No.", "id": "c-1"}
    (row,), _ = build("cot_collection", [record], *NAMES, "id=id")
    assert (row.id, row.media) == ("c-1", ())
    assert row.messages[0]["content"] == "Is <image> a tag?"


def test_editing_shows_an_image_behind_rationale_and_answer(build):
    record = {
        "ask": "Make the sky stormy.",
        "why": "Darker clouds.",
        "reply": "Here.",
        "pic": "a.jpg",
        "new": ["b.jpg"],
    }
    (row,), facts = build("image_editing", [record], *NAMES, "image=pic", "output_images=new")
    assert row.messages[0]["content"] == [IMAGE, text("Make the sky stormy.")]
    assert row.messages[1]["content"] == [text("Darker clouds.\n\n"), text("Here."), IMAGE]
    assert [item.path.name for item in row.media] == ["a.jpg", "b.jpg"]
    assert row.meta["needs_image_generation"] and has_target_media(row)
    assert (facts["rows_with_target_media"], facts["stated_rows"]) == (1, "9,024")


def test_images_inside_the_rationale_stand_where_it_says(build):
    record = {
        "ask": "Which is older?",
        "why": "First <image>\nThen <image>\nThe second has rust.",
        "reply": "The second.",
        "shown": ["1.jpg", "2.jpg"],
    }
    (row,), _ = build("mm_reasoning_mm", [record], *NAMES, "output_images=shown")
    assert row.messages[1]["content"] == [
        text("First "),
        IMAGE,
        text("Then "),
        IMAGE,
        text("The second has rust.\n\n"),
        text("The second."),
    ]
    assert row.meta["rationale_items"] == 5 and has_target_media(row)


def test_generation_without_a_rationale_column(build):
    record = {"ask": "Draw a cat.", "reply": "<image>", "new": "c.jpg"}
    (row,), _ = build("image_generation", [record], "question=ask", "answer=reply", "output_images=new")
    assert row.messages[1]["content"] == [IMAGE] and "rationale_items" not in row.meta


def test_a_file_that_holds_several_sets(build):
    records = [
        {"ask": "What?", "reply": "That.", "kind": "CoT-Collection"},
        {"ask": "Who?", "reply": "Ann.", "kind": "MMInternet"},
    ]
    rows, facts = build("mm_internet", records, "question=ask", "answer=reply", "set=kind")
    assert [row.messages[1]["content"] for row in rows] == ["Ann."]
    assert facts["dropped"] == {"of another set": 1}


def test_columns_must_be_named_and_right(build, tmp_path):
    record = {"ask": "Draw a cat.", "reply": "Here.", "new": "c.jpg"}
    with pytest.raises(OptionError, match="the columns are ask, reply, new"):
        build("image_editing", [record])
    assert [path.name for path in tmp_path.iterdir()] == ["image_editing.parquet"]
    with pytest.raises(RowError, match="no column for answer: response; the columns are ask, reply, new"):
        build("mm_reasoning_t", [record], "question=ask", "answer=response")
    with pytest.raises(RowError, match="an answer without an image"):
        build("image_generation", [record], "question=ask", "answer=reply")
