"""What a reference said of pairs, on disk: in pieces, of which each is there as a whole or not at all.

A pass over all pairs that is interrupted goes on with the pieces that are missing; several processes, and several
runs, may write at the same time. Nothing is unpickled.
"""

import json
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from mllm.checkpoints import sync
from mllm.errors import CheckpointError
from mllm.shapes import Float, Int, Tensor

INGREDIENTS = "ingredients.json"


class Piece(NamedTuple):
    """Some pairs.

    Args:
        positions: Of their rows in the mixture.
        values: The reference's log-probability of each side.
    """

    positions: Int[Tensor, " rows"]
    values: Float[Tensor, "rows sides"]


def write_piece(directory: Path, number: int, piece: Piece) -> None:
    """Have a piece on the disk, in one step."""
    path = _path(directory, number)
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex}")
    partial.write_bytes(save({"positions": piece.positions, "values": piece.values.contiguous()}))
    sync(partial)
    partial.replace(path)
    sync(directory)


def read_pieces(directory: Path, count: int) -> dict[int, Piece]:
    """Those of so many pieces that are there, by number.

    Raises:
        CheckpointError: One is damaged.
    """
    return {number: _read(_path(directory, number)) for number in range(count) if _path(directory, number).is_file()}


def describe(directory: Path, ingredients: dict[str, Any]) -> None:
    """Make the directory, and say in words what its name is a hash of, for people."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{INGREDIENTS}.partial-{uuid.uuid4().hex}"
    partial.write_text(json.dumps(ingredients, indent=2, default=repr) + "\n", encoding="utf-8")
    partial.replace(directory / INGREDIENTS)


def _path(directory: Path, number: int) -> Path:
    return directory / f"piece-{number:06d}.safetensors"


def _read(path: Path) -> Piece:
    try:
        tensors = load(path.read_bytes())
        positions, values = tensors["positions"], tensors["values"]
    except (SafetensorError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    if positions.ndim != 1 or values.ndim != 2 or len(positions) != len(values) or values.dtype != torch.float32:
        raise _damaged(path, f"{tuple(values.shape)} values for {tuple(positions.shape)} rows")
    return Piece(positions, values)


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"log-probabilities of the reference: {path}: {problem}",
        expected="the file as it was written",
        do="delete it; what it held is computed anew",
    )
