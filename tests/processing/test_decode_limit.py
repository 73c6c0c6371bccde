"""A decoder that hangs, crashes or eats memory ends; we, and the next call, do not."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

from mllm.errors import MediaError, OptionError
from mllm.processing import decode_limit
from mllm.processing.decode_limit import with_time_limit

FUNCTIONS = """
import ctypes, os, signal, sys, time
import numpy as np
from mllm.errors import MediaError

def echo(*args):
    return list(args)

def double(array):
    return {"array": array * 2, "bytes": b"\\n" * 9}

def process():
    return os.getpid()

def hang_in_c():
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    ctypes.PyDLL(None).sleep(600)  # with Python's lock held: no thread of it runs, and no handler

def nap(seconds):
    time.sleep(seconds)
    return os.getpid()

def crash():
    os.kill(os.getpid(), signal.SIGSEGV)

def leave():
    os._exit(3)

def eat():
    return len(bytearray(1 << 40))

def refuse():
    raise MediaError("a", expected="b", do="c")

def fail():
    raise KeyError("a bug")

def want():
    import a_package_that_nobody_has

def talk():
    os.write(1, b"to nobody\\n")
    print("to nobody", flush=True)
    return sys.stdin.read()

def odd():
    return object()
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "limited_functions.py").write_text(FUNCTIONS)
    sys.path.insert(0, str(folder))
    decode_limit._end_all()  # those that run do not know the folder
    import limited_functions

    yield limited_functions
    sys.path.remove(str(folder))
    decode_limit._end_all()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_values_cross_unchanged(functions, tmp_path):
    values = ["ä\n", 3, -0.25, None, True, b"\x00\n\xff", tmp_path, [1, [b"x"]], {"a": {"b": b"c"}}]
    assert with_time_limit(functions.echo, *values, seconds=30) == values
    for array in (
        np.arange(3_000_000, dtype=np.uint8).reshape(1000, 1000, 3),
        np.linspace(0, 1, 7, dtype=np.float32)[::-1],
        np.empty((0, 3), np.int64),
    ):
        result = with_time_limit(functions.double, array, seconds=30)
        assert result["bytes"] == b"\n" * 9
        assert result["array"].dtype == (array * 2).dtype
        assert np.array_equal(result["array"], array * 2)


def test_the_process_is_used_again(functions):
    processes = {with_time_limit(functions.process, seconds=30) for _ in range(3)}
    assert len(processes) == 1
    assert os.getpid() not in processes


def test_a_hang_in_native_code_is_killed_and_the_next_call_works(functions):
    process = with_time_limit(functions.process, seconds=30)
    begin = time.monotonic()
    with pytest.raises(MediaError, match="row 3: x.mp4 takes more than 0.3 seconds"):
        with_time_limit(functions.hang_in_c, seconds=0.3, name="row 3: x.mp4")
    assert time.monotonic() - begin < 60
    assert not _is_alive(process)
    assert with_time_limit(functions.process, seconds=30) != process


@pytest.mark.parametrize(
    ("function", "words"), [("crash", "signal 11"), ("leave", "exit status 3"), ("eat", "GiB of memory")]
)
def test_crashes_and_memory_name_the_file(function, words, functions):
    if function == "eat" and sys.platform != "linux":
        pytest.skip("the system does not keep the limit")
    with pytest.raises(MediaError, match=f"x.mp4 .*{words}"):
        with_time_limit(getattr(functions, function), seconds=30, name="x.mp4")
    assert with_time_limit(functions.echo, 1, seconds=30) == [1]


def test_errors_come_back(functions):
    with pytest.raises(MediaError) as caught:
        with_time_limit(functions.refuse, seconds=30)
    assert (caught.value.found, caught.value.expected, caught.value.do) == ("a", "b", "c")
    with pytest.raises(RuntimeError, match="KeyError: 'a bug'"):
        with_time_limit(functions.fail, seconds=30)
    with pytest.raises(RuntimeError, match="a object does not cross"):
        with_time_limit(functions.odd, seconds=30)
    with pytest.raises(TypeError, match="a object does not cross"):
        with_time_limit(functions.echo, object(), seconds=30)
    assert with_time_limit(functions.echo, 1, seconds=30) == [1]


def test_what_a_library_prints_does_not_mix_with_the_answer(functions):
    assert with_time_limit(functions.talk, seconds=30) == ""


def test_threads_have_a_process_each(functions):
    processes = []

    def call() -> None:
        processes.append(with_time_limit(functions.nap, 0.5, seconds=30))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(processes)) == 3


def _in_worker(functions, pipe) -> None:
    pipe.send([with_time_limit(functions.process, seconds=30) for _ in range(2)])
    pipe.recv()


@pytest.mark.parametrize("end", ["returns", "is killed"])
def test_a_forked_daemonic_worker_has_its_own_and_leaves_none_behind(end, functions):
    ours = with_time_limit(functions.process, seconds=30)
    context = multiprocessing.get_context("fork")
    near, far = context.Pipe()
    worker = context.Process(target=_in_worker, args=(functions, far), daemon=True)
    worker.start()
    first, second = near.recv()
    assert first == second != ours
    if end == "is killed":
        os.kill(worker.pid, signal.SIGKILL)
    else:
        near.send(None)
    worker.join()
    _wait_for(lambda: not _is_alive(first))
    assert with_time_limit(functions.process, seconds=30) == ours


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_package_that_is_not_installed_is_named(functions):
    with pytest.raises(OptionError, match="clip.mp4: the package a_package_that_nobody_has is not installed"):
        with_time_limit(functions.want, seconds=30, name="clip.mp4")
