"""Who reads what of a stream, and how far everybody is: pure functions of numbers of rows.

A unit is what can only be read as a whole: a row group of a shard. A reader is one worker of one rank. Units are dealt
out to readers; a reader goes through its units block by block, the rows of a block shuffled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Block:
    """Units that one reader holds in memory together.

    Args:
        units: Their numbers.
        order: The rows of all of them, one unit behind the other, as they are served.
    """

    units: tuple[int, ...]
    order: np.ndarray


def deal_units(
    sizes: Sequence[int], *, num_readers: int, epoch: int, seed: int, shuffle: bool = True
) -> list[list[int]]:
    """The units of each reader, in the order it reads them. Every unit has one reader.

    They are dealt in the epoch's order, each to the reader with the fewest rows so far: readers end with numbers of
    rows that differ by no more than the largest unit.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(sizes)) if shuffle else np.arange(len(sizes))
    readers: list[list[int]] = [[] for _ in range(num_readers)]
    num_rows = [0] * num_readers
    for unit in order.tolist():
        reader = num_rows.index(min(num_rows))
        readers[reader].append(unit)
        num_rows[reader] += sizes[unit]
    return readers


def blocks_of(
    units: Sequence[int], sizes: Sequence[int], *, block_units: int, epoch: int, seed: int, shuffle: bool = True
) -> list[Block]:
    """A reader's units in blocks; the first unit's number tells the shuffles of different readers apart."""
    blocks = []
    for start in range(0, len(units), block_units):
        chosen = tuple(units[start : start + block_units])
        num_rows = sum(sizes[unit] for unit in chosen)
        random = np.random.default_rng([seed, epoch, chosen[0], 1])
        blocks.append(Block(chosen, random.permutation(num_rows) if shuffle else np.arange(num_rows)))
    return blocks


def batches_done(num_batches: Sequence[int], emitted: int) -> tuple[list[int], int]:
    """How many batches each of several workers has handed over, and which worker is the next in turn.

    A `DataLoader` asks its workers in turn, and passes over those that have come to their end.

    Args:
        num_batches: Of each worker in the whole epoch.
        emitted: Of all workers so far.

    Example: of workers with 3 and 1 batches, after 3 batches, ([2, 1], 1): 0, 1, 0; it is worker 1's turn, who has
    nothing left.
    """
    done = [0] * len(num_batches)
    worker = 0
    for _ in range(min(emitted, sum(num_batches))):
        while done[worker] == num_batches[worker]:
            worker = (worker + 1) % len(num_batches)
        done[worker] += 1
        worker = (worker + 1) % len(num_batches)
    return done, worker
