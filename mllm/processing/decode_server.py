"""The process that `decode_limit` starts: calls functions by name until its pipe ends."""

import importlib
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from mllm.errors import MediaError
from mllm.processing.wire import Buffer, pack, unpack

# If the time is over and nobody is left to kill us, the system does, this much later.
GRACE_SECONDS = 5.0


def serve(max_memory: int) -> None:
    """Read requests from the standard input and write answers to the standard output, until it ends.

    Args:
        max_memory: Bytes that may be taken beyond what the process takes now.
    """
    requests, answers = _own_pipes()
    _limit_memory(max_memory)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers.write(b"ready\n")
    while line := requests.readline():
        module, function, seconds, args = unpack(line, lambda buffer: _read(requests, buffer))
        signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_SECONDS)
        parts = _answer(module, function, args)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for part in parts:
            _write(answers, part)


def _answer(module: str, function: str, args: list[Any]) -> list[Buffer]:
    try:
        value: Any = importlib.import_module(module)
        for part in function.split("."):
            value = getattr(value, part)
        return pack(["value", value(*args)])
    except MediaError as error:
        return pack(["media", [error.found, error.expected, error.do]])
    except ModuleNotFoundError as error:
        return pack(["missing", error.name])
    except MemoryError:
        return pack(["memory", None])
    except Exception:  # noqa: BLE001 - raised again by whoever asked
        return pack(["error", traceback.format_exc()])


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes, moved out of the way of libraries that print."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, answers


def _limit_memory(max_memory: int) -> None:
    if sys.platform != "linux":
        return  # macOS knows the limit and does not keep it
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = in_use + max_memory
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _read(stream: BinaryIO, buffer: memoryview) -> None:
    while buffer:
        num_bytes = stream.readinto(buffer)  # type: ignore[attr-defined]
        if not num_bytes:
            raise EOFError
        buffer = buffer[num_bytes:]


def _write(stream: BinaryIO, part: Buffer) -> None:
    view = memoryview(part)
    while view:
        view = view[stream.write(view) :]
