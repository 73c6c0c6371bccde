"""What is wrong with a source, found before training: its quarantine list, its media, its lengths, its duplicates."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mllm.data.auditing.audit_record import MediaAudit, SourceAudit, Tallies, Tally, TokenAudit
from mllm.data.auditing.render import encode_sides, num_learned, sides_of
from mllm.data.blobs import read_media_bytes
from mllm.data.coordinates import CroppedAwayError
from mllm.data.indexing.index_cache import media_root_of
from mllm.data.probe import probe_media
from mllm.data.quarantine import Bad
from mllm.data.schema import MediaItem, Row, has_target_media, media_of
from mllm.data.sources import Source
from mllm.errors import MediaError, RowError
from mllm.processing import TrainingProcessor

PREFIX_PARTS = 2
MAX_REASONS = 30

KINDS = (
    ("missing", r"does not exist"),
    ("outside the media root", r"outside the media root|\ba URL\b"),
    ("no regular file", r"is a directory|is a pipe|is a socket|is a device|loop of symbolic|no regular file"),
    ("empty", r"\bis empty\b"),
    ("too large, or extreme aspect", r" x \d+ pixels|pixels that Pillow opens|at most [\d,]+ (?:pixels|bytes)"),
    ("truncated or damaged", r"truncated|damaged|does not end"),
    (
        "not what the name says",
        r"no image of a known type|an HTML page|is no (?:image|audio|sound|video)|Git LFS|an? \w+ file",
    ),
    ("too slow to read", r"seconds"),
)
"""What an audit calls the reasons of the quarantine list that concern media, the first that fits."""


@runtime_checkable
class Index(Protocol):
    """What is audited: rows, and what was left out of them (`mllm.data.indexing.index.RowIndex`)."""

    source: Source
    num_bad: int
    dropped: Counter[str]
    licence: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def bad(self) -> list[Bad]: ...


def audit_source(
    index: Index,
    *,
    processor: TrainingProcessor | None = None,
    max_length: int | None = None,
    decode: Callable[[MediaItem, str], Any] | None = None,
    positions: Iterable[int] | None = None,
    seen: set[bytes] | None = None,
    progress: Callable[[], Any] | None = None,
) -> SourceAudit:
    """Look at every row and every media file of a source.

    Args:
        index: The source, opened with `on_bad: quarantine`, so that what is broken is listed and not raised.
        processor: Counts tokens; without one, lengths and losses are not looked at.
        max_length: Longest row that training will take.
        decode: Reads a media item in full, told the row's name, and raises a `MediaError`; None for headers only.
        positions: Which rows to look at; all by default.
        seen: Digests of the rows of sources audited before, to find duplicates across sources; it grows.
        progress: Called once a row.
    """
    source = index.source
    audit = SourceAudit(
        name=source.name or Path(source.path).stem,
        path=str(source.path),
        licence=index.licence,
        rows=len(index),
        bad_rows=index.num_bad,
        dropped=dict(index.dropped),
        tokens=None if processor is None else TokenAudit(max_length=max_length),
        decoded=decode is not None,
    )
    media = _MediaLooker(source, decode)
    for bad in index.bad():
        if bad.file:
            media.refuse(bad.file, bad.reason, str(bad))
        else:
            _tally(audit.bad, pattern_of(bad.reason)).add(str(bad))
    ids: set[bytes] = set()
    rows = seen if seen is not None else set()
    lengths: list[int] = []
    for position in range(len(index)) if positions is None else positions:
        row = index[position]
        audit.looked_at += 1
        audit.target_media += has_target_media(row)
        audit.coordinates += bool(row.coordinates)
        _add_duplicates(audit, row, ids, rows)
        for item in media_of(row):
            media.look(item, row)
        if audit.tokens is not None and processor is not None:
            _add_tokens(audit.tokens, row, processor, lengths)
        if progress:
            progress()
    audit.media = media.result()
    if audit.tokens is not None and lengths:
        audit.tokens.lengths = [int(value) for value in np.percentile(lengths, (0, 50, 95, 100), method="nearest")]
    return audit


def kind_of(reason: str) -> str:
    """What an audit calls a reason why a file cannot be used."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, reason)), "other")


def pattern_of(reason: str) -> str:
    """A reason without numbers and without quoted names, short words apart: reasons of one kind are counted together.

    Example: "messages = 3, expected a list" and "messages = 4, expected a list" are both
    "messages = N, expected a list".
    """
    first = re.sub(r"'(?![a-z_]{1,12}')[^']{0,200}'|\"[^\"]{0,200}\"", "'…'", reason.splitlines()[0] if reason else "")
    return re.sub(r"\d+(?:[.,]\d+)*", "N", first)[:160]


def prefix_of(path: str, root: str) -> str:
    """The first directories of a media path as published: what a download usually lacks as a whole.

    Example: "coco/train2017/000000000001.jpg" gives "coco/train2017".
    """
    if path.startswith(root.rstrip("/") + "/"):
        path = path[len(root.rstrip("/")) + 1 :]
    folders = PurePosixPath(path).parts[:-1]
    absolute = 1 if path.startswith("/") else 0
    return str(PurePosixPath(*folders[: PREFIX_PARTS + absolute])) if folders else "(no directory)"


class _MediaLooker:
    """Looks at each file once, however many rows show it."""

    def __init__(self, source: Source, decode: Callable[[MediaItem, str], Any] | None):
        self.root = str(media_root_of(source))
        self.decode = decode
        self.known: set[Any] = set()
        self.prefixes: dict[str, MediaAudit] = {}

    def refuse(self, file: str, reason: str, example: str) -> None:
        """Enter a file that the index has left out; rows that share it count once."""
        if ("refused", file) not in self.known:
            self.known.add(("refused", file))
            _tally(self._prefix(prefix_of(file, self.root)).refused, kind_of(reason)).add(example)

    def look(self, item: MediaItem, row: Row) -> None:
        name = str(item.path) if item.blob is None else f"{item.blob.container.name}/(inside)/-"
        prefix = self._prefix(prefix_of(name, self.root))
        prefix.items += 1
        key = item.path if item.blob is None else item.blob
        if key in self.known:
            return
        self.known.add(key)
        prefix.files += 1
        try:
            facts = probe_media(item.kind, read_media_bytes(item), where=row.name)
            if self.decode is not None:
                self.decode(item, row.name)
        except MediaError as error:
            _tally(prefix.refused, kind_of(error.found)).add(error.found)
            return
        for note in facts.notes:
            _tally(prefix.notes, note).add(f"{row.name}: {item.path or name}")

    def result(self) -> list[MediaAudit]:
        return sorted(self.prefixes.values(), key=lambda prefix: prefix.prefix)

    def _prefix(self, prefix: str) -> MediaAudit:
        return self.prefixes.setdefault(prefix, MediaAudit(prefix))


def _add_duplicates(audit: SourceAudit, row: Row, ids: set[bytes], rows: set[bytes]) -> None:
    for tally, known, digest in (
        (audit.same_id, ids, _digest(row.id)),
        (audit.same_row, rows, row_digest(row)),
    ):
        if digest in known:
            tally.add(row.name)
        known.add(digest)


def row_digest(row: Row) -> bytes:
    """Two rows that say the same about the same media have the same digest, whatever their ids."""
    sides = [(messages, [_media_key(item) for item in media]) for _, messages, media in sides_of(row)]
    return _digest(json.dumps(sides, sort_keys=True))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _media_key(item: MediaItem) -> list[Any]:
    return [item.kind, str(item.path if item.blob is None else item.blob), item.start, item.end]


def _add_tokens(tokens: TokenAudit, row: Row, processor: TrainingProcessor, lengths: list[int]) -> None:
    try:
        chats = encode_sides(row, processor)
    except CroppedAwayError as error:
        _tally(tokens.not_encoded, "a box is cropped away").add(error.found)
        return
    except RowError as error:
        _tally(tokens.not_encoded, pattern_of(error.found.removeprefix(row.name).lstrip(",: "))).add(error.found)
        return
    length = max(len(chat.input_ids) for chat in chats)
    learned = sum(num_learned(chat) for chat in chats)
    media = [sum(span.length for span in chat.media) for chat in chats]
    lengths.append(length)
    tokens.total += sum(len(chat.input_ids) for chat in chats)
    tokens.learned += learned
    tokens.media += sum(media)
    if not all(num_learned(chat) for chat in chats):
        tokens.nothing_learned.add(row.name)
    elif any(
        num_learned(chat) <= _num_answers(messages)
        for chat, (_, messages, _) in zip(chats, sides_of(row), strict=True)
    ):
        tokens.only_ends.add(row.name)
    if tokens.max_length is not None and length > tokens.max_length:
        tokens.overlong.add(f"{row.name}: {length} tokens")
        tokens.overlong_learned += learned
        tokens.overlong_media += max(media) > tokens.max_length


def _num_answers(messages: Sequence[dict[str, Any]]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def _tally(tallies: Tallies, name: str) -> Tally:
    if name not in tallies and len(tallies) >= MAX_REASONS:
        name = "other reasons"
    return tallies.setdefault(name, Tally())


def spread(size: int, limit: int | None) -> np.ndarray:
    """At most `limit` positions, evenly spread over all rows."""
    return np.linspace(0, size - 1, size if limit is None else min(size, limit)).round().astype(int)
