"""All images that can be retrieved, as a search needs them: a vector of each, and a small copy to know it again by."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.data.collate import decode_media
from mllm.data.schema import MediaItem, Row, media_of
from mllm.errors import MediaError
from mllm.preference_data.embedders import ImageEmbedder
from mllm.preference_data.records import RecordFile

SMALL = 16
"""Side of the small copy."""

_THREADS = 4


def images_of(rows: Iterable[Row]) -> dict[MediaItem, int]:
    """The images of rows, each with its number: one that many rows show has one."""
    known: dict[MediaItem, int] = {}
    for row in rows:
        for item in media_of(row):
            if item.kind == "image":
                known.setdefault(item, len(known))
    return known


def embed_pictures(
    items: Sequence[MediaItem],
    embedder: ImageEmbedder,
    path: Path,
    *,
    batch_size: int,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Embed images, and keep what comes of it in a file that goes on where it ends.

    Args:
        items: The images; always the same for one file.
        embedder: Makes vectors of them.
        path: The file.
        batch_size: Images embedded at once, and put on record at once.
        progress: Told how many more images are done.

    Returns:
        A record of each image, memory-mapped: `is_read` (0 for one that cannot be decoded; its row says so, and it is
        never retrieved), `small` [16, 16, 3] and `vector` [D] of length 1.
    """
    file = RecordFile(path, block=batch_size)
    done = file.num_records(len(items))
    if progress:
        progress(done)
    width = embedder.embed([Image.new("RGB", (64, 64))]).shape[1] if done < len(items) else 0
    with ThreadPoolExecutor(max_workers=_THREADS) as threads:
        for start in range(done, len(items), batch_size):
            images = list(threads.map(_decoded, items[start : start + batch_size]))
            read = [image for image in images if image is not None]
            vectors = embedder.embed(read).cpu().numpy() if read else np.zeros((0, width), np.float32)
            file.add(_records(images, vectors), at=start)
            if progress:
                progress(len(images))
    return file.read()


def is_same_picture(one: np.ndarray, others: np.ndarray, *, levels: float) -> np.ndarray:
    """Which pictures are copies of another, in whatever size and file form.

    Args:
        one: The small copy of a picture.
        others: Those of some others.
        levels: How much two copies may differ in the mean of all pixels and colours, of 255.
    """
    differences = np.abs(others.astype(np.int16) - one.astype(np.int16))
    return differences.mean(axis=(1, 2, 3)) <= levels


def _decoded(item: MediaItem) -> Image.Image | None:
    try:
        return decode_media(item, where="")
    except MediaError:
        return None


def _records(images: Sequence[Image.Image | None], vectors: np.ndarray) -> np.ndarray:
    kind = [("is_read", "u1"), ("small", "u1", (SMALL, SMALL, 3)), ("vector", "<f4", (vectors.shape[1],))]
    records = np.zeros(len(images), np.dtype(kind))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = iter(vectors / np.maximum(lengths, np.finfo(np.float32).tiny))
    for record, image in zip(records, images, strict=True):
        if image is not None:
            record["is_read"] = 1
            record["small"] = np.asarray(image.resize((SMALL, SMALL), Image.Resampling.BOX))
            record["vector"] = next(units)
    return records
