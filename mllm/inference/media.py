"""The media of a conversation: what its messages name, how large it is, and what a model gets of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mllm.data.collate import decode_item
from mllm.data.probe import probe_media
from mllm.data.schema import MediaItem
from mllm.errors import MediaError
from mllm.processing import TrainingProcessor
from mllm.processing.audio import decode_audio
from mllm.processing.images import ImageSource, image_size
from mllm.processing.media import MediaInput
from mllm.sizes import MediaSize

KINDS = ("image", "audio", "video")
FileSource = str | Path | bytes
"""A file's path, or its content."""

NOUNS = {"image": "image", "audio": "sound", "video": "video"}
"""What one item of a kind is called in messages to people."""
_UNKNOWN_RATE = 16_000


@dataclass(frozen=True)
class Medium:
    """A media item of a conversation, not decoded yet.

    Args:
        item: Its kind, its size by its header, and what is cut out of it.
        source: What a decoder takes: a file or its content; of an image a PIL image, too.
        name: How errors call it.
    """

    item: MediaItem
    source: Any
    name: str

    @property
    def size(self) -> MediaSize:
        """What its tokens are counted by."""
        return self.item.size

    def decoded(self, processor: TrainingProcessor, *, row: int) -> MediaInput:
        """The item as the processor takes it.

        Raises:
            MediaError: It is damaged, or its header is wrong.
        """
        return decode_item(self.item, self.source, processor, row=row, where=self.name)


def read_medium(content: Mapping[str, Any], *, name: str) -> Medium:
    """Look at a media item of a message; only its header is read.

    Args:
        content: `{"type": kind, kind: source}`; of a sound or a video, `start` and `end` in seconds cut a part out.
        name: How errors call it.

    Raises:
        MediaError: It is missing, of another kind, damaged in its header, or the cut does not lie in it.
    """
    kind = content["type"]
    source = content.get(kind)
    if kind == "image" and isinstance(source, ImageSource):
        height, width = image_size(source, where=name)
        return Medium(MediaItem("image", None, height, width), source, name)
    if kind == "image" or not isinstance(source, FileSource):
        raise MediaError(
            f"{name} given as {type(source).__name__}",
            expected=f"{'a PIL image, a path' if kind == 'image' else 'a path'} or bytes under the key `{kind}`",
            do=f'write the item as {{"type": "{kind}", "{kind}": ...}}',
        )
    file = Path(source) if isinstance(source, str) else source
    facts = probe_media(kind, file, where=name)
    item = MediaItem(kind, None, facts.height, facts.width, facts.frames, facts.seconds)
    if kind == "audio" and not facts.seconds:
        item = replace(item, seconds=_decoded_seconds(file, name))
    return Medium(_cut(item, content.get("start"), content.get("end"), name), file, name)


def counted(kinds: list[str]) -> str:
    """How many media of each kind there are, in words."""
    counts = {NOUNS[kind]: kinds.count(kind) for kind in KINDS if kind in kinds}
    return ", ".join(f"{count} {noun}{'s' if count > 1 else ''}" for noun, count in counts.items())


def _decoded_seconds(source: Path | bytes, name: str) -> float:
    """The length of a sound whose header does not say it, as that of a stream recorded in a browser."""
    samples, rate = decode_audio(source, sampling_rate=_UNKNOWN_RATE, where=name)
    return len(samples) / rate


def _cut(item: MediaItem, start: Any, end: Any, name: str) -> MediaItem:
    if start is None and end is None:
        return item
    last = item.seconds if end is None else end
    if not all(isinstance(moment, int | float) for moment in (start or 0.0, last)) or not (
        0 <= (start or 0.0) < min(last, item.seconds)
    ):
        raise MediaError(
            f"{name}: start = {start!r}, end = {end!r}, of {item.seconds:.2f} seconds",
            expected="seconds, from a start within it to an end behind that",
            do="correct the cut, or leave `start` and `end` out",
        )
    return replace(item, start=start, end=end)
