"""Sizes of the media of many rows: each file is looked at once, several at a time, and compared with the rows."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mllm.data.blobs import read_blob
from mllm.data.indexing.content_keys import Stamp, stamp_of
from mllm.data.probe import MediaFacts, probe_media
from mllm.data.schema import Blob, MediaItem
from mllm.errors import MediaError

REMEMBERED = 1_000_000
"""Files whose facts are kept in memory; beyond it all are forgotten, and looked at again when they come again."""
_THREADS = 8
_SLACK = 0.1
"""Seconds, or share of the length, by which a stated length may differ: containers round."""

Key = tuple[str, str] | tuple[str, Blob]


@dataclass(frozen=True, slots=True)
class Probed:
    """What is known of a media file: facts, or the reason why there are none.

    Args:
        facts: From its header.
        problem: "" for a good file.
        stamp: Of the file as it was looked at; None where there is no file of its own.
    """

    facts: MediaFacts
    problem: str = ""
    stamp: Stamp | None = None


class MediaProbes:
    """Probe media, remembering results.

    Args:
        found: Told of every file that was looked at, in an order that depends on the rows alone.
    """

    def __init__(self, found: Callable[[str, str, Probed], None]):
        self._found = found
        self._known: dict[Key, Probed] = {}
        self._threads = ThreadPoolExecutor(_THREADS)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def look_at(self, items: Iterable[MediaItem]) -> None:
        """Probe those of the items' files that are not known yet; several at a time, for disks that answer slowly."""
        new = list(dict.fromkeys(key for item in items if (key := key_of(item)) not in self._known))
        for key, probed in zip(new, self._threads.map(_probe, new, chunksize=1), strict=True):
            self._known[key] = probed
            if isinstance(key[1], str):
                self._found(key[0], key[1], probed)

    def forget_if_many(self) -> None:
        """Bound the memory; called when no item waits to be measured."""
        if len(self._known) > REMEMBERED:
            self._known.clear()

    def put(self, item: MediaItem, data: bytes) -> None:
        """Probe embedded bytes that are in memory now."""
        key = key_of(item)
        if key not in self._known:
            self._known[key] = _probe_bytes(item.kind, data)

    def measured(self, item: MediaItem) -> tuple[MediaItem, str]:
        """The item with the sizes of its file, and what is wrong with it, "" for nothing."""
        probed = self._known[key_of(item)]
        facts = probed.facts
        problem = probed.problem or _disagreement(item, facts)
        if problem:
            return item, problem
        sizes = (facts.height, facts.width, facts.frames, facts.seconds)
        return MediaItem(item.kind, item.path, *sizes, item.start, item.end, item.blob), ""


def key_of(item: MediaItem) -> Key:
    """What two items have in common that are one file of one kind."""
    return (item.kind, str(item.path)) if item.blob is None else (item.kind, item.blob)


def _probe(key: Key) -> Probed:
    kind, source = key
    if isinstance(source, Blob):
        try:
            return _probe_bytes(kind, read_blob(source))
        except MediaError as error:
            return Probed(MediaFacts(), _reason(error))
    try:
        stamp = stamp_of(source)
    except (OSError, ValueError):
        stamp = None
    try:
        return Probed(probe_media(kind, Path(source)), "", stamp)
    except MediaError as error:
        return Probed(MediaFacts(), _reason(error), stamp)
    except OSError as error:
        return Probed(MediaFacts(), f"cannot be read: {os.strerror(error.errno or 0)}; expected a media file", stamp)


def _probe_bytes(kind: str, data: bytes) -> Probed:
    try:
        return Probed(probe_media(kind, data))
    except MediaError as error:
        return Probed(MediaFacts(), _reason(error))


def _reason(error: MediaError) -> str:
    return f"{error.found}; expected {error.expected}"


def _disagreement(item: MediaItem, facts: MediaFacts) -> str:
    """How what the row says of a file differs from the file."""
    if item.height and (item.height, item.width) != (facts.height, facts.width):
        return f"is {facts.height} x {facts.width}, the row says {item.height} x {item.width} (height x width)"
    if item.frames and facts.frames and item.frames != facts.frames:
        return f"has {facts.frames} frames, the row says {item.frames}"
    slack = max(_SLACK, _SLACK * facts.seconds)
    if item.seconds and facts.seconds and abs(item.seconds - facts.seconds) > slack:
        return f"is {facts.seconds:.2f} s long, the row says {item.seconds:.2f} s"
    if item.end is not None and item.end <= (item.start or 0.0):
        return f"is cut from {item.start or 0.0} s to {item.end} s; expected an end behind the start"
    if item.start and facts.seconds and item.start >= facts.seconds:
        return f"is {facts.seconds:.2f} s long, and the row's cut begins at {item.start} s"
    return ""
