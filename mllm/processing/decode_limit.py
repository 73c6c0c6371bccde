"""Decoders that cannot hang us: they run in a process of their own, which is killed when the time is over.

Native decoders ignore Python's signals and hold its lock, so neither a thread nor an alarm ends them. The process is
kept for the next call, holds nothing of ours but what a call passes, and starts without torch in 0.2 seconds. It works
inside data workers, which may not have `multiprocessing` children.
"""

import atexit
import fcntl
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mllm.errors import MediaError, OptionError
from mllm.processing.wire import Buffer, pack, unpack

MAX_MEMORY = 4 << 30
"""What a decoder may take, in bytes, on systems that enforce it."""
START_SECONDS = 60.0

_PACKAGE = Path(__file__).resolve().parent.parent
# The packages' own `__init__` would import torch and transformers: seconds, and 400 MB, for each process.
_BOOT = """
import os, sys, types
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:] = sys.argv[3:]
for name, folder in (("mllm", sys.argv[1]), ("mllm.processing", sys.argv[1] + "/processing")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from mllm.processing.decode_server import serve
serve(int(sys.argv[2]))
"""


def with_time_limit(function: Callable[..., Any], *args: Any, seconds: int | float, name: str = "the decoder") -> Any:
    """Call a function in another process, which is killed when the time is over.

    Several threads may call at once; each gets a process of its own.

    Args:
        function: A function of a module; it is looked up by name there.
        args: What `mllm.processing.wire` can carry: strings, numbers, None, bytes, paths, arrays, lists and dicts.
        seconds: How long the call may take. Starting the process does not count.
        name: What is decoded, for messages.

    Returns:
        What the function returns, tuples as lists.

    Raises:
        MediaError: The function raised one, took too long, wanted too much memory, or crashed.
        RuntimeError: The function raised anything else.
    """
    child = _take()
    try:
        kind, value = child.call([function.__module__, function.__qualname__, seconds, list(args)], seconds)
    except TimeoutError:
        raise MediaError(
            f"{name} takes more than {seconds:g} seconds to decode",
            expected="a file that can be decoded in time",
            do="convert the file anew, cut it, or drop the row",
        ) from None
    except EOFError as error:
        raise MediaError(
            f"{name} ends the decoder ({error})",
            expected="a file that can be decoded",
            do="convert the file anew, or drop the row",
        ) from None
    finally:
        _give_back(child)
    if kind == "value":
        return value
    if kind == "media":
        found, expected, do = value
        raise MediaError(found, expected=expected, do=do)
    if kind == "memory":
        raise MediaError(
            f"{name} takes more than {MAX_MEMORY >> 30} GiB of memory to decode",
            expected="a file that can be decoded in less",
            do="make it smaller, or drop the row",
        )
    if kind == "missing":
        raise OptionError(
            f"{name}: the package {value} is not installed",
            expected="the packages that read audio and video",
            do="install this project with its extra `data`: pip install '.[data]' in the checkout",
        )
    raise RuntimeError(f"{name}: the decoder's process failed\n{value}")


class _Child:
    """One process and the two pipes to it."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, str(_PACKAGE), str(MAX_MEMORY), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for us; the process ends with its pipe
        )
        self.requests, self.answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        for pipe in (self.requests, self.answers):
            _widen(pipe)
        os.set_blocking(self.requests, False)
        self.pending = bytearray()  # read, and not yet used
        self.is_ready = self.is_dead = False

    def call(self, request: list[Any], seconds: int | float) -> Any:
        """Send a request and wait for its answer.

        Raises:
            TimeoutError: It took too long; the process is dead.
            EOFError: The process died.
        """
        try:
            if not self.is_ready:
                self._read_line(time.monotonic() + START_SECONDS)
                self.is_ready = True
            deadline = time.monotonic() + seconds
            for part in pack(request):
                self._write(part, deadline)
            return unpack(self._read_line(deadline), lambda buffer: self._read(buffer, deadline))
        except (BrokenPipeError, EOFError):
            raise EOFError(self._cause_of_death()) from None
        except BaseException:  # else the rest of this answer would be taken for the next one
            self.kill()
            raise

    def kill(self) -> None:
        self.is_dead = True
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()

    def _cause_of_death(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.kill()
        code = self.process.returncode
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def _write(self, data: Buffer, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self.requests, select.POLLOUT, deadline)
            view = view[os.write(self.requests, view) :]

    def _read_line(self, deadline: float) -> bytes:
        while (end := self.pending.find(b"\n")) < 0:
            _wait(self.answers, select.POLLIN, deadline)
            data = os.read(self.answers, 1 << 16)
            if not data:
                raise EOFError
            self.pending += data
        line = bytes(self.pending[: end + 1])
        del self.pending[: end + 1]
        return line

    def _read(self, buffer: memoryview, deadline: float) -> None:
        num_pending = min(len(self.pending), len(buffer))
        buffer[:num_pending] = self.pending[:num_pending]
        del self.pending[:num_pending]
        buffer = buffer[num_pending:]
        while buffer:
            _wait(self.answers, select.POLLIN, deadline)
            num_bytes = os.readv(self.answers, [buffer])
            if not num_bytes:
                raise EOFError
            buffer = buffer[num_bytes:]


_LOCK = threading.Lock()
_IDLE: list[_Child] = []
_ALL: set[_Child] = set()


def _take() -> _Child:
    with _LOCK:
        if _IDLE:
            return _IDLE.pop()
    child = _Child()
    with _LOCK:
        _ALL.add(child)
    return child


def _give_back(child: _Child) -> None:
    with _LOCK:
        if child.is_dead:
            _ALL.discard(child)
        else:
            _IDLE.append(child)


@atexit.register
def _end_all() -> None:
    for child in list(_ALL):
        child.kill()
    _ALL.clear()
    _IDLE.clear()


def _forget_all() -> None:
    """In a forked process: the children are our parent's. Close our ends of their pipes, and leave them alone."""
    global _LOCK
    _LOCK = threading.Lock()
    for child in _ALL:
        child.close()
        child.process.returncode = 0  # or it would be waited for
    _ALL.clear()
    _IDLE.clear()


os.register_at_fork(after_in_child=_forget_all)


def _wait(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError


def _widen(pipe: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError):  # a user may have used up what users may have
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
