"""A directory is complete or not there."""

import multiprocessing
import os
import signal
import time

import pytest

from mllm.checkpoints import COMPLETE, atomic_directory, is_complete, read_complete
from mllm.errors import CheckpointError


def test_what_is_written_appears_with_its_record(tmp_path):
    with atomic_directory(tmp_path / "a", kind="model", facts={"seed": 3}) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "weights").write_text("w")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "sub" / "weights").read_text() == "w"
    assert is_complete(tmp_path / "a", kind="model") and not is_complete(tmp_path / "a", kind="export")
    assert read_complete(tmp_path / "a")["seed"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="disk full"), atomic_directory(tmp_path / "a", kind="model") as partial:
        (partial / "weights").write_text("half")
        raise RuntimeError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_name_is_refused_and_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="exists already"), atomic_directory(tmp_path / "a", kind="model"):
        pytest.fail("the block must not run")
    assert (tmp_path / "a" / "mine").read_text() == "keep"


def _write_for_ever(target):
    with atomic_directory(target, kind="model") as partial:
        (partial / "weights").write_text("half")
        time.sleep(60)


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path):
    writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path / "a",))
    writer.start()
    while not list(tmp_path.glob("a.partial-*/weights")):
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(f"*/{COMPLETE}"))
    with atomic_directory(tmp_path / "a", kind="model"):
        pass
    assert is_complete(tmp_path / "a")
