"""Tensors in a checkpoint's safetensors files, to be read and written slice by slice."""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mllm.errors import CheckpointError
from mllm.shapes import Shaped, Tensor

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By the names that safetensors gives them."""


class StoredTensor(NamedTuple):
    """A tensor that lies in a file.

    Args:
        name: In the file.
        shape: Its sides.
        dtype: Of its numbers.
        file: Open.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Any

    def read(self, rows: slice) -> Shaped[Tensor, "..."]:
        """Some of its rows; of a single number, that as one row."""
        return self.file.get_slice(self.name)[rows] if self.shape else self.file.get_tensor(self.name).view(1)


class StoredWeights:
    """The tensors of a checkpoint by name, its files open while it is entered.

    A tensor that is tied to another is not among them, whether the checkpoint has a copy of it or not.

    Args:
        directory: Of the checkpoint.
        tied: See `tied_weights`.
    """

    def __init__(self, directory: Path, tied: Mapping[str, str]):
        self.directory = directory
        self._tied = tied
        self._tensors: dict[str, StoredTensor] = {}
        self._files = ExitStack()

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors."""
        return frozenset(self._tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        """The tensor of that name."""
        return self._tensors[name]

    def __enter__(self) -> "StoredWeights":
        """Open the files.

        Raises:
            CheckpointError: A file is missing or not what the index says, or tied weights differ.
        """
        with ExitStack() as files:
            for path, expected in _weight_files(self.directory).items():
                self._open(path, expected, files)
            self._files = files.pop_all()
        self._leave_out_tied()
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files."""
        self._files.close()

    def _open(self, path: Path, expected: set[str] | None, files: ExitStack) -> None:
        try:
            file = files.enter_context(safe_open(str(path), "pt"))
        except (SafetensorError, OSError) as error:
            raise _broken(path, str(error).splitlines()[0]) from error
        names = set(file.keys())
        if expected is not None and names != expected:
            raise _broken(path, f"its tensors are not those of {INDEX}")
        for name in names:
            piece = file.get_slice(name)
            kind = piece.get_dtype()
            if kind not in DTYPES:
                raise _broken(path, f"{name} is of type {kind}")
            self._tensors[name] = StoredTensor(name, tuple(piece.get_shape()), DTYPES[kind], file)

    def _leave_out_tied(self) -> None:
        for copy, source in self._tied.items():
            if copy not in self._tensors:
                continue
            tensor = self._tensors.pop(copy)
            own = self._tensors.setdefault(source, tensor)
            if own is not tensor and not torch.equal(own.read(slice(None)), tensor.read(slice(None))):
                raise CheckpointError(
                    f"{self.directory}: {copy} is not equal to {source}, and its configuration ties them",
                    expected="equal tensors, or a configuration with `tie_word_embeddings: false`",
                    do="correct config.json, or save the model anew",
                )


def tied_weights(directory: Path) -> dict[str, str]:
    """What a model's configuration ties: the names of copies, with those of what they are copies of."""
    config = AutoConfig.from_pretrained(str(directory))
    is_language_model = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = AutoModelForCausalLM if is_language_model else AutoModelForMultimodalLM
    with torch.device("meta"):
        return dict(kind.from_config(config).all_tied_weights_keys)


def write_tensors(
    path: Path, entries: Mapping[str, tuple[tuple[int, ...], torch.dtype]], pieces: Iterable[Shaped[Tensor, "..."]]
) -> None:
    """Write a safetensors file, of which no more than a piece is in memory.

    Its form is the length of a header, the header (JSON, filled up with blanks to a multiple of 8 bytes), and the
    tensors' bytes.

    Args:
        path: Of the file.
        entries: Shape and type of each tensor, in the order of the pieces, the widest types first.
        pieces: What the tensors consist of, row by row.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in entries.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert file.tell() == 8 + len(text) + end, f"{path} is not as long as its header says"


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The files, and which tensors an index says that each has."""
    index = directory / INDEX
    if index.is_file():
        places: dict[Path, set[str] | None] = {}
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            known = places.setdefault(directory / file, set())
            assert known is not None
            known.add(name)
        return places
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    raise CheckpointError(
        f"{directory} has neither {SINGLE} nor {INDEX}",
        expected="a whole model's weights in safetensors; adapters and pickled weights are not mixed",
        do="merge an adapter first, or save the model anew with `save_pretrained`",
    )


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {reason}", expected="a whole safetensors file", do="download or save the checkpoint anew"
    )
