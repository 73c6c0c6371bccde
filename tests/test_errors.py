"""Errors say found, expected, do this; and survive a trip between processes."""

import pickle

import pytest

from mllm.errors import MllmError, RowError, user_errors


def test_message_has_its_three_parts():
    error = RowError("row 7 has two images", expected="one", do="remove one")
    assert str(error) == "found: row 7 has two images\nexpected: one\ndo this: remove one"


def test_errors_of_data_workers_arrive_whole():
    error = pickle.loads(pickle.dumps(RowError("a", expected="b", do="c")))
    assert type(error) is RowError and (error.found, error.expected, error.do) == ("a", "b", "c")


def test_programs_end_with_the_message_and_status_2(capsys):
    with pytest.raises(SystemExit) as ended, user_errors():
        raise MllmError("a", expected="b", do="c")
    assert ended.value.code == 2 and "found: a\nexpected: b\ndo this: c" in capsys.readouterr().err


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError
