"""Results on disk: what a kill leaves behind is whole, and nothing is done twice that need not be."""

import json

import pytest

from mllm.errors import CheckpointError
from mllm.preference_data.journal import Journal, carry_out


class KilledError(Exception):
    """Stands for the end of the process."""


def test_a_journal_holds_what_was_kept(tmp_path):
    with Journal(tmp_path / "step" / "0.jsonl") as journal:
        journal.keep({3: {"text": "a\nb \u2028 é"}, 1: {"text": ""}})
        journal.keep({3: {"text": "again"}})
    with Journal(tmp_path / "step" / "0.jsonl") as journal:
        assert journal.records == {3: {"text": "again"}, 1: {"text": ""}}


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path):
    with Journal(tmp_path / "0.jsonl") as journal:
        journal.keep({0: {"text": "first"}})
        journal.keep({1: {"text": "sécond"}})
    whole = (tmp_path / "0.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        (tmp_path / "torn.jsonl").write_bytes(whole[:length])
        with Journal(tmp_path / "torn.jsonl") as journal:
            assert journal.records == {0: {"text": "first"}}
            journal.keep({1: {"text": "sécond"}})
        assert (tmp_path / "torn.jsonl").read_bytes() == whole


@pytest.mark.parametrize("line", [b"{}\n", b"[1]\n", b"nonsense\n", b"\xff\n"])
def test_a_damaged_line_is_an_error(tmp_path, line):
    (tmp_path / "0.jsonl").write_bytes(line)
    with pytest.raises(CheckpointError, match=r"0\.jsonl: a damaged line"):
        Journal(tmp_path / "0.jsonl")


def run(path, numbers, *, portion, keeps_each, kill_after=None, unanswered=()):
    """Carry out a step; returns the portions that were handed over, and the numbers without a result."""
    asked, given = [], 0

    def work(tasks):
        nonlocal given
        asked.append(tasks)
        for place, task in reversed(list(enumerate(tasks))):  # in any order
            if given == kill_after:
                raise KilledError
            given += 1
            yield place, None if task in unanswered else {"double": 2 * task}

    with Journal(path) as journal:
        try:
            options = {"portion": portion, "keeps_each": keeps_each}
            without = carry_out(journal, numbers, task_of=lambda number: number, work=work, **options)
        except KilledError:
            return asked, None
        answered = [number for number in numbers if number not in unanswered]
        assert {number: journal.records[number] for number in answered} == {n: {"double": 2 * n} for n in answered}
    return asked, without


def test_each_result_is_kept_as_it_comes(tmp_path):
    for kill_after in range(7):
        path = tmp_path / f"{kill_after}.jsonl"
        run(path, list(range(7)), portion=3, keeps_each=True, kill_after=kill_after)
        before = {json.loads(line)["number"] for line in path.read_text().splitlines()}
        assert len(before) == kill_after
        asked, without = run(path, list(range(7)), portion=3, keeps_each=True)
        assert sorted(task for part in asked for task in part) == sorted(set(range(7)) - before) and without == []


def test_a_portion_is_kept_and_repeated_as_a_whole(tmp_path):
    portions = [[0, 1, 2], [3, 4, 5], [6]]
    for kill_after in range(7):
        path = tmp_path / f"{kill_after}.jsonl"
        run(path, list(range(7)), portion=3, keeps_each=False, kill_after=kill_after)
        asked, _ = run(path, list(range(7)), portion=3, keeps_each=False)
        assert asked == portions[kill_after // 3 :]


@pytest.mark.parametrize("keeps_each", [True, False])
def test_what_has_no_result_is_named_and_asked_again(tmp_path, keeps_each):
    path = tmp_path / "0.jsonl"
    _, without = run(path, list(range(5)), portion=5, keeps_each=keeps_each, unanswered=(1, 4))
    assert sorted(without) == [1, 4]
    asked, without = run(path, list(range(5)), portion=5, keeps_each=keeps_each)
    assert without == [] and sorted(asked[0]) == ([1, 4] if keeps_each else [0, 1, 2, 3, 4])
    assert run(path, list(range(5)), portion=5, keeps_each=keeps_each)[0] == []


def test_progress_counts_every_task_once(tmp_path):
    run(tmp_path / "0.jsonl", list(range(7)), portion=3, keeps_each=True, kill_after=4)
    told = []
    with Journal(tmp_path / "0.jsonl") as journal:
        carry_out(
            journal, range(7), task_of=int, work=lambda tasks: ((place, {}) for place in range(len(tasks))),
            portion=3, keeps_each=True, progress=told.append,
        )  # fmt: skip
    assert sum(told) == 7
