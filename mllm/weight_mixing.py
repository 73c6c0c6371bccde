"""Mix the weights of language models of one shape: theta = w_1 theta_1 + w_2 theta_2 + ...

With two and weights (beta, 1 - beta) this is how SPHINX joins what one model learned from real and another from
synthetic captions (arXiv 2311.07575). No model is loaded: tensors are read and written slice by slice.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mllm.checkpoints import atomic_directory, refuse_existing
from mllm.errors import CheckpointError, OptionError
from mllm.load import checkpoint_directory
from mllm.shapes import Shaped, Tensor
from mllm.weight_files import INDEX, SINGLE, StoredTensor, StoredWeights, tied_weights, write_tensors

COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
NOT_COPIED = (INDEX, "complete.json", "run.json", "trainer_state.json", "export_report.json")
"""What the first model's directory has beside its weights, and what of it does not hold for the mixture."""
NAMES_ONLY = ("_name_or_path", "name_or_path", "transformers_version", "architectures", "use_cache")
"""Fields of a configuration that say nothing of the weights; so do the next."""
NOT_COMPARED = (*NAMES_ONLY, "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
MIXED = tuple(getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16"))
SLICE_NUMBERS = 1 << 22
SHARD_BYTES = 1 << 30


class MixReport(NamedTuple):
    """What was written: how many tensors, numbers and files."""

    num_tensors: int
    num_parameters: int
    num_files: int


def mix_checkpoints(
    models: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> MixReport:
    """Write the weighted sum of checkpoints as a checkpoint, with the first one's tokenizer and configuration.

    Sums are made in float64. What is no floating-point number has to be equal in all. A slice of one tensor of each
    model is in memory at a time.

    Args:
        models: Directories or Hub ids, at least two.
        weights: One for each, which add up to 1; negative ones extrapolate.
        out: Directory to be made; it must not exist.
        dtype: "float32", "bfloat16" or "float16"; by default each tensor's in the first model.
        shard_bytes: How large a file may be, unless one tensor is larger.

    Raises:
        CheckpointError: Models differ in configuration, vocabulary, names or shapes, or `out` exists.
        OptionError: Numbers of models and weights differ, weights do not add up to 1, or an unknown dtype.
    """
    _check_weights(models, weights)
    target = _output_dtype(dtype)
    refuse_existing(Path(out))
    directories = [checkpoint_directory(model) for model in models]
    _check_configurations(directories)
    _check_vocabularies(directories)
    facts = {"mixed_from": {"models": [str(model) for model in models], "weights": list(weights)}}
    with ExitStack() as files, atomic_directory(out, kind="model", facts=facts) as partial:
        tied = tied_weights(directories[0])
        stored = [files.enter_context(StoredWeights(directory, tied)) for directory in directories]
        _check_tensors(stored)
        _copy_others(directories[0], partial, dtype)
        shards = _shards(stored[0], target, shard_bytes)
        for number, names in enumerate(shards, start=1):
            entries = {name: (stored[0][name].shape, _dtype(stored[0][name], target)) for name in names}
            pieces = (piece for name in names for piece in _mixed([one[name] for one in stored], weights, target))
            write_tensors(partial / _file_name(number, len(shards)), entries, pieces)
        if len(shards) > 1:
            _write_index(partial, shards, stored[0], target)
        numbers = sum(math.prod(stored[0][name].shape) for name in stored[0].names)
        return MixReport(len(stored[0].names), numbers, len(shards))


def _check_weights(models: Sequence[str | Path], weights: Sequence[float]) -> None:
    if len(models) < 2 or len(models) != len(weights):
        raise OptionError(
            f"{len(models)} models and {len(weights)} weights",
            expected="two models or more, and a weight for each",
            do="correct `models` or `weights`",
        )
    if not math.isclose(sum(weights), 1.0, abs_tol=1e-6) or not all(map(math.isfinite, weights)):
        raise OptionError(
            f"weights {', '.join(f'{weight:g}' for weight in weights)}, which add up to {sum(weights):g}",
            expected="a sum of 1: otherwise all weights of the model would grow or shrink",
            do="correct `weights`",
        )


def _output_dtype(name: str | None) -> torch.dtype | None:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in MIXED}
    if name is not None and name not in known:
        raise OptionError(f"dtype = {name!r}", expected=f"one of {', '.join(known)}", do="set `dtype` to one of them")
    return None if name is None else known[name]


def _check_configurations(directories: Sequence[Path]) -> None:
    first, *others = [_read_config(directory) for directory in directories]
    if "quantization_config" in first:
        raise CheckpointError(
            f"{directories[0]}, whose weights are quantised",
            expected="weights in floating point: quantised ones cannot be added",
            do="mix the models that they were made from",
        )
    for directory, other in zip(directories[1:], others, strict=True):
        fields = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if fields:
            raise CheckpointError(
                f"{directories[0]} and {directory} differ in {', '.join(fields[:5])} "
                f"({first.get(fields[0])!r}, {other.get(fields[0])!r})"[:400],
                expected="models of one configuration, trained from the same start",
                do="mix models that were tuned from one base model",
            )


def _read_config(directory: Path) -> dict[str, Any]:
    return _compared(json.loads((directory / "config.json").read_text(encoding="utf-8")))


def _compared(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the fields that may differ, in its parts too."""
    return {
        name: _compared(value) if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name not in NOT_COMPARED
    }


def _check_vocabularies(directories: Sequence[Path]) -> None:
    """Rows of the embeddings are added up, so a row has to be the same word's."""
    known = [(one, vocabulary) for one in directories if (vocabulary := _vocabulary(one)) is not None]
    for directory, vocabulary in known[1:]:
        first, words = known[0]
        differing = sorted(word for word in words.keys() | vocabulary if words.get(word) != vocabulary.get(word))
        if differing:
            raise CheckpointError(
                f"the tokenizers of {first} and {directory} number {len(differing)} tokens differently, such as "
                f"{differing[0]!r}",
                expected="one vocabulary: the rows of a token's embeddings are added up",
                do="mix models with the same tokenizer",
            )


def _vocabulary(directory: Path) -> dict[str, int] | None:
    """Ids of all tokens; None where there is no tokenizer file."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    saved = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = saved["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # of a unigram model: pairs of a word and its score, in order
        vocabulary = {word: number for number, (word, *_) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in saved.get("added_tokens", ())}}


def _check_tensors(stored: Sequence[StoredWeights]) -> None:
    first = stored[0]
    for other in stored[1:]:
        lacking = sorted(first.names - other.names) + sorted(other.names - first.names)
        shapes = [name for name in sorted(first.names & other.names) if first[name].shape != other[name].shape]
        if not lacking and not shapes:
            continue
        found = f"{len(lacking)} tensors are in one alone, such as {lacking[0]}" if lacking else ""
        if not lacking:
            found = f"{shapes[0]} has shape {list(first[shapes[0]].shape)} and {list(other[shapes[0]].shape)}"
        raise CheckpointError(
            f"{first.directory} and {other.directory}: {found}",
            expected="tensors of the same names and shapes",
            do="mix models that were tuned from one base model, with embeddings of the same size",
        )


def _mixed(
    tensors: Sequence[StoredTensor], weights: Sequence[float], target: torch.dtype | None
) -> Iterator[Shaped[Tensor, "..."]]:
    """The weighted sum of one tensor, slice by slice."""
    first = tensors[0]
    can_be_mixed = {one.dtype for one in tensors} <= set(MIXED)
    for rows in _slices(first.shape):
        slices = [one.read(rows) for one in tensors]
        if not can_be_mixed:
            yield _equal(first.name, slices)
            continue
        total = torch.zeros(slices[0].shape, dtype=torch.float64)
        for weight, piece in zip(weights, slices, strict=True):
            total += weight * piece.double()
        mixed = total.to(_dtype(first, target))
        if not torch.isfinite(mixed).all():
            raise CheckpointError(
                f"{first.name} of the mixture has values that are no numbers, or too large for {mixed.dtype}",
                expected="finite weights",
                do="check the models' weights, or choose a wider `dtype`",
            )
        yield mixed


def _equal(name: str, slices: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
    """Values that cannot be mixed, and are the same in all."""
    first, *others = slices
    if any(other.dtype != first.dtype or not torch.equal(other, first) for other in others):
        raise CheckpointError(
            f"{name} of type {first.dtype} differs between the models",
            expected="equal values where they are no floating-point numbers",
            do="mix models that were tuned from one base model",
        )
    return first


def _slices(shape: Sequence[int]) -> Iterator[slice]:
    """Ranges of rows of a bounded size, which cover them all."""
    rows = shape[0] if shape else 1
    step = max(1, SLICE_NUMBERS // max(1, math.prod(shape[1:])))
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _shards(stored: StoredWeights, target: torch.dtype | None, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    # The widest types first, so that every tensor lies at a multiple of its own in the file.
    for name in sorted(stored.names, key=lambda name: (-_dtype(stored[name], target).itemsize, name)):
        size = _num_bytes(stored[name], target)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _num_bytes(tensor: StoredTensor, target: torch.dtype | None) -> int:
    return math.prod(tensor.shape) * _dtype(tensor, target).itemsize


def _dtype(tensor: StoredTensor, target: torch.dtype | None) -> torch.dtype:
    """What a tensor is written as."""
    return target if target is not None and tensor.dtype in MIXED else tensor.dtype


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_index(
    directory: Path, shards: Sequence[Sequence[str]], stored: StoredWeights, target: torch.dtype | None
) -> None:
    places = {name: _file_name(number, len(shards)) for number, names in enumerate(shards, 1) for name in names}
    index = {
        "metadata": {"total_size": sum(_num_bytes(stored[name], target) for name in stored.names)},
        "weight_map": places,
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_others(source: Path, partial: Path, dtype: str | None) -> None:
    """Everything of the first model that is no weight: configuration, tokenizer, chat template."""
    names = {file.name: file for pattern in COPIED for file in source.glob(pattern)}
    for name, file in names.items():
        if name not in NOT_COPIED:
            shutil.copyfile(file, partial / name)
    if dtype is None:
        return
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": dtype}
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
