"""Retrieval: for each image the ones that look most like it, itself and its copies left out."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mllm.errors import OptionError
from mllm.preference_data.pictures import is_same_picture
from mllm.preference_data.records import RecordFile

BLOCK = 1024
"""Images whose neighbours are looked for at once, and put on record at once."""

_NUMBERS_AT_ONCE = 1 << 26
"""Similarities that the search without faiss holds in memory."""

NOBODY = -1
"""In place of a neighbour where there are fewer."""


@dataclass(frozen=True)
class Retrieval:
    """Which images are retrieved.

    Args:
        top_k: How many for each image, at most; Re-Align: 10.
        max_similarity: One whose cosine with the image is higher is taken for a copy of it; 1 for no such limit, as
            what is near depends on the encoder.
        copy_levels: One is taken for a copy, too, if both, shrunk to 16 x 16 pixels, differ by at most so many levels
            of 255 in the mean.
    """

    top_k: int = 10
    max_similarity: float = 1.0
    copy_levels: float = 2.0

    def __post_init__(self):
        if self.top_k < 1:
            raise OptionError(f"top_k = {self.top_k}", expected="1 or more", do="raise it")
        if not -1 <= self.max_similarity <= 1:
            raise OptionError(
                f"max_similarity = {self.max_similarity}", expected="a cosine, from -1 to 1", do="correct it"
            )
        if self.copy_levels < 0:
            raise OptionError(f"copy_levels = {self.copy_levels}", expected="0 or more", do="correct it")


@runtime_checkable
class Search(Protocol):
    """Finds vectors by their cosine with others. All have length 1."""

    def nearest(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the nearest vectors of each query, and the cosines, highest first: two [queries, count]."""


class FaissSearch:
    """All vectors are compared, by faiss.

    Args:
        vectors: [N, D], float32.
    """

    def __init__(self, vectors: np.ndarray):
        import faiss

        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)

    def nearest(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Search`."""
        cosines, numbers = self._index.search(queries, count)
        return numbers, cosines


class PlainSearch:
    """All vectors are compared, by numpy: what is done without faiss.

    Args:
        vectors: [N, D], float32.
    """

    def __init__(self, vectors: np.ndarray):
        self._vectors = vectors

    def nearest(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Search`."""
        step = max(1, _NUMBERS_AT_ONCE // len(self._vectors))
        parts = [self._some(queries[start : start + step], count) for start in range(0, len(queries), step)]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _some(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        cosines = queries @ self._vectors.T
        some = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        found = np.take_along_axis(cosines, some, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        return np.take_along_axis(some, order, axis=1), np.take_along_axis(found, order, axis=1)


SEARCHES: dict[str, type[FaissSearch] | type[PlainSearch]] = {"faiss": FaissSearch, "numpy": PlainSearch}
"""Both find the same; faiss is faster from some ten thousand images on."""


def search_by_default() -> str:
    """The fastest that is installed."""
    return "faiss" if importlib.util.find_spec("faiss") else "numpy"


def find_neighbours(
    pictures: np.ndarray,
    path: Path,
    retrieval: Retrieval,
    *,
    search: str,
    progress: Callable[[int], Any] | None = None,
) -> np.ndarray:
    """Find the neighbours of every image, and keep them in a file that goes on where it ends.

    Args:
        pictures: As `embed_pictures` made them; always the same for one file.
        path: The file.
        retrieval: Which neighbours count.
        search: A key of `SEARCHES`.
        progress: Told how many more images are done.

    Returns:
        A record of each image, memory-mapped: `number` [top_k] of its neighbours, nearest first, and `cosine` [top_k];
        `NOBODY` where there are fewer.

    Raises:
        OptionError: There is no such search, or it is not installed.
    """
    file = RecordFile(path, block=BLOCK)
    done = file.num_records(len(pictures))
    if progress:
        progress(done)
    if done == len(pictures):
        return file.read()
    found = _search(search, pictures)
    for start in range(done, len(pictures), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(pictures)))
        file.add(_neighbours(pictures, block, found, retrieval), at=start)
        if progress:
            progress(len(block))
    return file.read()


def _search(name: str, pictures: np.ndarray) -> Search:
    if name not in SEARCHES:
        raise OptionError(f"search = {name!r}", expected=f"one of {', '.join(SEARCHES)}", do="choose one")
    if name == "faiss" and importlib.util.find_spec("faiss") is None:
        raise OptionError(
            "search = faiss, which is not installed", expected="faiss-cpu", do="install it, or use numpy"
        )
    return SEARCHES[name](np.ascontiguousarray(pictures["vector"]))


def _neighbours(pictures: np.ndarray, block: np.ndarray, search: Search, retrieval: Retrieval) -> np.ndarray:
    """The records of some images. Where too many of the nearest are copies, more are asked for."""
    kind = [("number", "<i4", (retrieval.top_k,)), ("cosine", "<f4", (retrieval.top_k,))]
    records = np.zeros(len(block), np.dtype(kind))
    records["number"] = NOBODY
    places = np.flatnonzero(pictures["is_read"][block])
    count = retrieval.top_k + 1
    while len(places):
        count = min(2 * count, len(pictures))
        queries = np.ascontiguousarray(pictures["vector"][block[places]])
        numbers, cosines = search.nearest(queries, count)
        short = []
        for place, number, cosine in zip(places, numbers, cosines, strict=True):
            kept = _admitted(pictures, int(block[place]), number, cosine, retrieval)
            records["number"][place, : len(kept)] = number[kept]
            records["cosine"][place, : len(kept)] = cosine[kept]
            if len(kept) < retrieval.top_k and count < len(pictures):
                short.append(place)
        places = np.array(short, np.int64)
    return records


def _admitted(
    pictures: np.ndarray, own: int, numbers: np.ndarray, cosines: np.ndarray, retrieval: Retrieval
) -> np.ndarray:
    """The places of those found that may be retrieved, nearest first; of equal ones that of the lower number."""
    others = pictures[numbers]
    is_copy = is_same_picture(pictures["small"][own], others["small"], levels=retrieval.copy_levels)
    is_near = (cosines > retrieval.max_similarity) & (retrieval.max_similarity < 1)  # rounding may give 1.0000001
    places = np.flatnonzero((numbers != own) & (others["is_read"] == 1) & ~is_copy & ~is_near)
    order = np.lexsort((numbers[places], -cosines[places]))
    return places[order][: retrieval.top_k]
