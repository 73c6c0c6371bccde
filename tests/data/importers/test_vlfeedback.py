"""VLFeedback's rated answers into pairs, in both published forms. Ratings and pairs are worked out by hand."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mllm.data.importers import IMPORTERS, detect_format
from mllm.data.importers.base import Drop, ImportProblem, Record
from mllm.data.importers.preferences import LEFT_OUT
from mllm.data.reading.read import read_records
from mllm.data.sources import Source
from mllm.errors import OptionError


def completion(text, ratings, model="m"):
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    notes = {
        aspect: {"Rating": rating, "Rationale": "so"} for aspect, rating in zip(aspects, ratings.split(), strict=True)
    }
    return {"annotations": notes, "model": model, "response": text}


A, B, C, D = (  # mean ratings 5, 4, 4, 2
    completion("a", "5 5 5", "best"),
    completion("b", "4 3 5"),
    completion("c", "4 4 4"),
    completion("d", "1 4 1", "worst"),
)
ROW = {"id": "q-1", "prompt": "What?", "models": ["best"], "completions": [D, B, A, C], "img_path": "images/1.jpg"}


def convert(row=ROW, **options):
    return list(IMPORTERS["vlfeedback"].convert(Record(row, "f", 0), Source("f", options=options)))


def pairs(row=ROW, **options):
    return [(row["chosen"]["content"], row["rejected"]["content"]) for row in convert(row, **options)]


def test_which_answers_meet():
    assert pairs() == [("a", "d"), ("b", "d"), ("c", "d"), ("a", "b"), ("a", "c")]  # b and c tie
    assert pairs(pairs="best_worst") == [("a", "d")]
    assert pairs(pairs="adjacent") == [("c", "d"), ("a", "b")]
    assert pairs(min_margin=2) == [("a", "d"), ("b", "d"), ("c", "d")]
    assert pairs(min_margin=2, pairs="adjacent") == [("c", "d")]


def test_a_row_and_what_makes_none():
    first, *others = convert()
    assert first["messages"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert first["media"] == [{"kind": "image", "path": "images/1.jpg"}]
    scores = {"score_chosen": 5.0, "model_chosen": "best", "score_rejected": 2.0, "model_rejected": "worst"}
    assert first["meta"] == {**scores, LEFT_OUT: {"a tie": 1}}
    assert [row["id"] for row in (first, *others)] == ["q-1/0", "q-1/1", "q-1/2", "q-1/3", "q-1/4"]
    assert all(LEFT_OUT not in row["meta"] for row in others)
    (only,) = convert(min_margin=3)
    assert only["id"] == "q-1" and only["meta"][LEFT_OUT] == {"a difference below min_margin": 4, "a tie": 1}


def test_an_answer_that_is_not_rated_makes_no_pair():
    unrated = [completion("x", "5 N/A 5"), completion("y", "5 nan 5"), {"model": "m", "response": "z"}]
    row = {**ROW, "completions": [A, *unrated, D]}
    assert pairs(row) == [("a", "d")]
    assert convert(row)[0]["meta"][LEFT_OUT] == {"an answer without numeric ratings": 3}
    with pytest.raises(Drop, match="an answer without numeric ratings"):
        convert({**ROW, "completions": [A, *unrated]})
    with pytest.raises(Drop, match="a tie"):
        convert({**ROW, "completions": [B, C]})
    with pytest.raises(Drop, match="no two answers"):
        convert({**ROW, "completions": []})
    with pytest.raises(Drop, match="both answers are the same"):
        convert({**ROW, "completions": [A, {**D, "response": "a"}]})


def test_the_published_jsonl_and_the_hubs_parquet_say_the_same(tmp_path):
    (tmp_path / "vlfeedback_80k.jsonl").write_text(json.dumps(ROW) + "\n")
    as_columns = {key: [item[key] for item in ROW["completions"]] for key in ("annotations", "model", "response")}
    table = pa.Table.from_pylist([{**ROW, "completions": as_columns}])
    pq.write_table(table, tmp_path / "train.parquet")
    found = []
    for name in ("vlfeedback_80k.jsonl", "train.parquet"):
        source = Source(tmp_path / name)
        (record,) = read_records(source)
        importer = detect_format([record], source)
        assert importer.name == "vlfeedback"
        found.append(list(importer.convert(record, source)))
    assert found[0] == found[1] == convert()


@pytest.mark.parametrize("options", [{"pairs": "some"}, {"min_margin": -1}, {"min_margin": "1"}, {"min_margin": True}])
def test_wrong_options(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        convert(**options)


@pytest.mark.parametrize("completions", ["a", [3], {"model": ["m", "m"], "response": ["a"]}, None])
def test_malformed_completions(completions):
    with pytest.raises(ImportProblem, match="completions"):
        convert({**ROW, "completions": completions})
