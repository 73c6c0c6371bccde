"""The loss of each source of a mixture, summed by tokens over micro-batches, steps and ranks."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from accelerate.utils import gather_object

from mllm.data.labels import IGNORED
from mllm.data.sources import Source
from mllm.shapes import Float, Int, Tensor, TokenIds


class SourceLosses:
    """Sums up what supervised tokens add to the loss, on this rank, without waiting for the device.

    Args:
        names: Of the sources, in the order of their numbers.
        unit: What is counted, as the log names it.
    """

    def __init__(self, names: Sequence[str], *, unit: str = "supervised_tokens"):
        self.names = tuple(names)
        self.unit = unit
        self.num_empty = 0
        """Micro-batches in which nothing is learned since this was last read; they weigh nothing."""
        self._sums: Tensor | None = None

    def add(self, sources: Int[Tensor, " S"], token_losses: Float[Tensor, " S"]) -> None:
        """Take the losses of a micro-batch, and the source of each token, see `with_token_sources`."""
        if not len(token_losses):
            self.num_empty += 1
            return
        exact = torch.float32 if token_losses.device.type == "mps" else torch.float64
        if self._sums is None:
            self._sums = torch.zeros(2, len(self.names), dtype=exact, device=token_losses.device)
        both = torch.stack([token_losses.to(exact), torch.ones_like(token_losses, dtype=exact)])
        self._sums.index_add_(1, sources, both)

    def read(self) -> dict[str, int | float]:
        """The mean loss of each source that was seen on any rank since this was last read; all ranks ask together.

        Returns:
            "loss" over all tokens, "loss/NAME" of each source where there are several, how many tokens, and
            "empty_micro_batches" if there were any. No loss where nothing was seen.
        """
        own = (torch.zeros(2, len(self.names)) if self._sums is None else self._sums).tolist()
        ranks = gather_object([(own, self.num_empty)])
        self._sums, num_empty, self.num_empty = None, sum(empty for _, empty in ranks), 0
        sums = [sum(values) for values in zip(*(found[0] for found, _ in ranks), strict=True)]
        counts = [round(sum(values)) for values in zip(*(found[1] for found, _ in ranks), strict=True)]
        logs: dict[str, int | float] = {self.unit: sum(counts)}
        if any(counts):
            logs["loss"] = sum(sums) / sum(counts)
        if len(self.names) > 1:
            logs |= {
                f"loss/{name}": total / count
                for name, total, count in zip(self.names, sums, counts, strict=True)
                if count
            }
        return logs | ({"empty_micro_batches": num_empty} if num_empty else {})


def num_supervised(labels: TokenIds) -> int:
    """How many tokens the loss is computed on: the first of a row has nothing before it that could tell it."""
    return int((labels[:, 1:] != IGNORED).sum())


def with_token_sources(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A micro-batch in which `sources` are those of the supervised tokens.

    That is found out while the batch is on the CPU; on a GPU the answer would have to be waited for.
    """
    sources = token_sources(batch["labels"], batch["sources"], batch.get("segment_lengths"))
    return {**batch, "sources": sources}


def token_sources(
    labels: TokenIds, sources: Int[Tensor, " rows"], segment_lengths: Sequence[int] | None = None
) -> Int[Tensor, " S"]:
    """The source of each supervised token, in the order of the loss: row by row, the first column left out.

    Args:
        labels: Of a padded batch, or the one row of a packed one; -100 where nothing is learned.
        sources: Of each row, or of each segment.
        segment_lengths: Of a packed batch.

    Example: rows [[-100, 7], [8, 9]] of sources (1, 0) give [1, 0].
    """
    is_supervised = labels[:, 1:] != IGNORED
    if not is_supervised.any():  # also a micro-batch without any row
        return sources[:0]
    if segment_lengths is None:
        by_token = sources[:, None].expand_as(labels)
    else:
        lengths = torch.tensor(segment_lengths, device=sources.device)
        by_token = sources.repeat_interleave(lengths, output_size=labels.shape[1])[None]
    return by_token[:, 1:][is_supervised]


def source_names(sources: Iterable[Source]) -> tuple[str, ...]:
    """A readable name for each source, no two alike: its own or its file's, with its folder's where that is needed.

    Example: llava/train.json, digits/train.json and coco.json are llava/train, digits/train and coco.
    """
    listed = list(sources)
    short = [source.name or _stem(source.path) for source in listed]
    counts = Counter(short)
    names = [
        name if counts[name] == 1 else "/".join(part for part in (_folder(source.path), name) if part)
        for name, source in zip(short, listed, strict=True)
    ]
    again: Counter[str] = Counter()
    for place, name in enumerate(names):
        again[name] += 1
        if again[name] > 1:
            names[place] = f"{name}#{again[name]}"
    return tuple(names)


def _stem(path: Any) -> str:
    name = PurePath(str(path)).name
    return name.split(".")[0] or name


def _folder(path: Any) -> str:
    return PurePath(str(path)).parent.name
