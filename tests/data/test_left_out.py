"""What is left out is counted; what is broken is listed once, by all ranks and across restarts, up to a rate."""

import json
from collections import Counter

import pytest

from mllm.data.left_out import BAD, LeftOut, LeftOutRows, usable_batches
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.data.quarantine import Bad
from mllm.errors import MediaError, RowError
from mllm.testing import save_tiny_rows


@pytest.fixture
def rows(tmp_path):
    """Ten rows, of which up to three may be broken, and one that was broken before."""
    path = save_tiny_rows(tmp_path / "rows", 11)
    (tmp_path / "rows" / "images" / "1-0.png").unlink()
    return open_mixture(read_mixture([{"path": str(path), "on_bad": "quarantine", "max_bad_rate": 0.3}]))


def _broken(number: int) -> LeftOut:
    error = MediaError(f"file {number}", expected="a picture", do="mend it")
    return LeftOut(number, BAD, Bad(f"row-{number}", f"line {number}", "a.png", f"file {number}"), error)


def test_every_row_is_counted_and_broken_ones_are_listed_once(rows, tmp_path):
    account, path = LeftOutRows(rows), tmp_path / "quarantine.jsonl"
    account.add(_broken(3))  # before the file may be written
    account.write_to(path)
    for row in (LeftOut(2, "too long"), LeftOut(2, "too long"), _broken(4), _broken(4)):
        account.add(row)
    assert account.counts == {"too long": 2, BAD: 3}
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["id"], entry["found"]) for entry in entries] == [
        ("row-1", "indexing"), ("row-3", "training"), ("row-4", "training")
    ]  # fmt: skip
    assert entries[2] == {
        "source": str(tmp_path / "rows" / "rows.jsonl"), "found": "training", "id": "row-4", "where": "line 4",
        "file": "a.png", "reason": "file 4",
    }  # fmt: skip


def test_no_file_without_a_broken_row(tmp_path):
    rows = open_mixture(read_mixture([str(save_tiny_rows(tmp_path / "rows", 3))]))
    account = LeftOutRows(rows)
    account.write_to(tmp_path / "quarantine.jsonl")
    account.add(LeftOut(0, "too long"))
    assert account.counts == Counter({"too long": 1}) and not (tmp_path / "quarantine.jsonl").exists()


def test_ranks_and_restarts_count_together_against_the_rate(rows, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    first, second = LeftOutRows(rows), LeftOutRows(rows)
    first.write_to(path)
    second.write_to(path)
    first.add(_broken(0))
    second.add(_broken(5))
    second.add(_broken(0))  # known already
    again = LeftOutRows(rows)
    again.write_to(path)
    again.add(_broken(6))
    assert len(path.read_text().splitlines()) == 4
    with pytest.raises(MediaError, match=r"(?s)4 of 10 rows .* row 'row-7' .*at most 30.00%.*quarantine.jsonl"):
        again.add(_broken(7))


def test_half_a_line_of_another_rank_is_left_for_later(rows, tmp_path):
    account, path = LeftOutRows(rows), tmp_path / "quarantine.jsonl"
    account.write_to(path)
    with path.open("a") as file:
        file.write('{"source": "x", "fou')
    account.add(_broken(0))
    assert account.counts[BAD] == 1


def test_an_error_is_raised_as_it_was_where_the_source_wants_it(tmp_path):
    path = save_tiny_rows(tmp_path / "rows", 3)
    strict, lenient = (
        LeftOutRows(open_mixture(read_mixture([{"path": str(path), "on_bad": on_bad, "max_bad_rate": 1}])))
        for on_bad in ("error", "quarantine")
    )
    with pytest.raises(MediaError, match="found: file 1"):
        strict.add(_broken(1))
    lenient.add(_broken(1))
    error = RowError("wrong", expected="right", do="this")
    with pytest.raises(RowError, match="found: wrong"):
        lenient.add(LeftOut(0, BAD, error=error, is_error=True))


def test_batches_come_as_they_are_asked_for_and_tell_first():
    told, source = [], iter([("a", (LeftOut(0, "x"),)), ("b", ()), ("c", (LeftOut(1, "y"),))])
    batches = usable_batches(source, told.append)
    assert next(batches) == "a" and [row.reason for row in told] == ["x"]
    assert next(source) == ("b", ())
    with pytest.raises(MediaError, match="found: file 2"):
        list(usable_batches([("d", (_broken(2),))]))
