"""The figures by hand, and the page."""

import pytest
from PIL import Image

from mllm.data.schema import MediaItem, Row
from mllm.preference_data.answered import Answered
from mllm.preference_data.examples_page import examples_page, pair_view, runs
from mllm.preference_data.outcomes import NONE_ACCEPTED, Outcome
from mllm.preference_data.phrases import EMPTY, NO_PHRASE, TOO_SIMILAR, Phrase
from mllm.preference_data.report import report_of, report_table

OUTCOMES = [
    Outcome(0, NO_PHRASE),
    Outcome(1, phrases=(Phrase(0, 1, "object"),), tries=("",), rejected="b", cosine=0.5, similarity=0.2),
    Outcome(2, phrases=(Phrase(0, 1, "colour"),), tries=(EMPTY, ""), rejected="b", cosine=0.7, similarity=0.4),
    Outcome(3, NONE_ACCEPTED, tries=(TOO_SIMILAR, TOO_SIMILAR, EMPTY)),
]


def test_figures():
    assert report_of(iter(OUTCOMES)) == {
        "rows": 4,
        "pairs": 2,
        "acceptance": pytest.approx(2 / 3, abs=1e-4),
        "rejected_rows": {NO_PHRASE: 1, NONE_ACCEPTED: 1},
        "completions": 6,
        "rejected_completions": {EMPTY: 2, TOO_SIMILAR: 2},
        "pairs_by_rank": {"1": 1, "2": 1},
        "masked_phrases": {"object": 1, "colour": 1},
        "similarity": {"5 %": pytest.approx(0.21), "median": pytest.approx(0.3), "95 %": pytest.approx(0.39)},
        "cosine": {"5 %": pytest.approx(0.51), "median": pytest.approx(0.6), "95 %": pytest.approx(0.69)},
    }


def test_figures_of_nothing():
    report = report_of([])
    assert report["rows"] == report["pairs"] == 0 and report["acceptance"] is None and report["similarity"] == {}
    assert "pairs" in report_table(report)


def test_table_has_every_reason():
    table = report_table(report_of(OUTCOMES))
    for name, count in ((NO_PHRASE, 1), (NONE_ACCEPTED, 1), (EMPTY, 2), (TOO_SIMILAR, 2), ("pairs", 2)):
        (line,) = [
            line
            for line in table.splitlines()
            if line.split("  ")[1:2] == [name] or line.strip().startswith(f"{name} ")
        ]
        assert f" {count} " in line


def test_runs_join_to_the_text():
    text = "a red cup and a blue one"
    found = runs(text, [Phrase(2, 9), Phrase(16, 20)])
    assert "".join(piece for piece, _ in found) == text
    assert [piece for piece, is_marked in found if is_marked] == ["red cup", "blue"]
    assert runs("", []) == [] and runs("x", [Phrase(0, 1)]) == [("x", True)]


def test_page_shows_pairs_as_text(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "own.png")
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "other.png")
    own, other = (MediaItem("image", tmp_path / name, 20, 20) for name in ("own.png", "other.png"))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What <b>is</b> it?"}]}]
    row = Row("<row>", "world", messages, (own,), "rows.jsonl, line 1")
    answer = "It is a <red> cup\u202e."
    outcome = Outcome(0, phrases=(Phrase(8, 13),), tries=("",), rejected="It is a blue cup.", cosine=0.5)
    view = pair_view(Answered(row, messages, answer, own), other, outcome)
    page = examples_page([view], report_of([outcome]), title="Pairs", facts=["<fact>"])
    assert '<mark class="old">&lt;red&gt;</mark>' in page and '<mark class="new">blue</mark>' in page
    assert "&lt;row&gt;" in page and "What &lt;b&gt;is&lt;/b&gt; it?" in page and "&lt;fact&gt;" in page
    assert (
        r"\u202e" in page and "\u202e" not in page and "<script" not in page and "http" not in page.split("<style>")[1]
    )
    assert page.count('<img src="data:image/') == 2 and "own.png" in page and "other.png" in page
