"""Values to bytes and back, between us and a process that has read strangers' files: no pickles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# A message is one line of JSON, in which bytes and arrays are numbered, and then their contents one after another.
Buffer = bytes | memoryview


def pack(value: Any) -> list[Buffer]:
    """The parts of a message, to be written one after another.

    Args:
        value: Strings, numbers, None, bytes, paths, arrays, and lists, tuples and string-keyed dicts of such. Tuples
            arrive as lists.
    """
    buffers: list[Buffer] = []
    tree = _strip(value, buffers)
    return [json.dumps(tree).encode() + b"\n", *buffers]


def unpack(line: bytes, read: Callable[[memoryview], None]) -> Any:
    """The value of a message.

    Args:
        line: Its first line.
        read: Fills a buffer with the bytes that follow.
    """
    return _fill(json.loads(line), read)


def _strip(value: Any, buffers: list[Buffer]) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_strip(item, buffers) for item in value]
    if isinstance(value, dict):
        return {"dict": [[str(key), _strip(item, buffers)] for key, item in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, bytes):
        buffers.append(value)
        return {"bytes": len(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = np.ascontiguousarray(value)
        buffers.append(value.data.cast("B") if value.size else b"")
        return {"array": value.dtype.str, "shape": list(value.shape)}
    raise TypeError(f"a {type(value).__name__} does not cross")


def _fill(tree: Any, read: Callable[[memoryview], None]) -> Any:
    if isinstance(tree, list):
        return [_fill(item, read) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "dict" in tree:
        return {key: _fill(item, read) for key, item in tree["dict"]}
    if "path" in tree:
        return Path(tree["path"])
    if "bytes" in tree:
        content = bytearray(tree["bytes"])
        read(memoryview(content))
        return bytes(content)
    array = np.empty(tree["shape"], np.dtype(tree["array"]))
    if array.size:
        read(array.data.cast("B"))
    return array
