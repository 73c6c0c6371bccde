"""What decides what a reference says of the pairs of a run, and nothing that does not.

Log-probabilities of equal keys are equal, up to the rounding that comes with the size of a batch and the kind of the
device.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import transformers

from mllm.data.contrasts import CROP, Contrast
from mllm.data.examples import Examples
from mllm.data.indexing.token_counts import fingerprint
from mllm.errors import MediaError
from mllm.load import ADAPTER_CONFIG, base_model_path
from mllm.models.parts import quantized_parts
from mllm.processing import TrainingProcessor
from mllm.training.feature_cache.ingredients import code_digest
from mllm.training.feature_cache.media import Content
from mllm.training.preference_options import PreferenceArguments
from mllm.training.run_record import hash_files

FORMAT = 1
"""Of the files, and of what is asked; a higher number makes all that was kept before void."""


def reference_ingredients(
    args: PreferenceArguments,
    *,
    weights: dict[str, Any],
    examples: Examples,
    contents: Sequence[Content | MediaError],
) -> dict[str, Any]:
    """Everything that decides what a reference says of these pairs, as JSON can hold it.

    Args:
        args: The run's options.
        weights: See `hash_model`.
        examples: The pairs.
        contents: Of all their media, in order of appearance.
    """
    return {
        "format": FORMAT,
        "weights": weights,
        "computed_in": computed_in(args),
        "quantized": sorted(quantized_parts(args.parts)) if args.reference is None else [],
        "sides": _plain(args.sides),
        "released_log_probs": args.released_log_probs,
        "rows": [[source["sha256"], source["take"]] for source in examples.rows.fingerprints()],
        "taken": _hash([*map(np.asarray, examples.rows.taken), examples.used, examples.lengths]),
        "media": _hash([np.frombuffer(_told(content), np.uint8) for content in contents]),
        "processor": hash_processor(examples.processor),
    }


def computed_in(args: PreferenceArguments) -> dict[str, str | None]:
    """The type of the weights, and of mixed precision: DeepSpeed has no autocast, but casts the weights."""
    mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    return {"weights": args.dtype, "cast" if args.deepspeed_plugin is not None else "autocast": mixed}


def hash_model(directory: Path) -> dict[str, Any]:
    """What a model consists of: its files, and where it is an adapter those of the model that it belongs to."""
    found: dict[str, Any] = {"files": hash_files(directory)}
    if (directory / ADAPTER_CONFIG).is_file():
        found["base"] = hash_files(base_model_path(directory))
    return found


def hash_processor(processor: TrainingProcessor) -> dict[str, Any]:
    """Everything that decides what a model reads of a row: tokenizer, template, settings, our code, the libraries."""
    with tempfile.TemporaryDirectory() as directory:
        processor.save_pretrained(directory)
        # The tokenizer's file also holds what its last call has left on.
        files = {name: value for name, value in hash_files(Path(directory)).items() if name != "tokenizer.json"}
    return {
        "text": fingerprint(processor),
        "settings": files,
        "code": {kind: code_digest(kind) for kind in sorted(processor.media_kinds)},
        "versions": {"transformers": transformers.__version__, "pillow": PIL.__version__},
    }


def _plain(contrast: Contrast) -> dict[str, Any]:
    """A run's seed decides its crops alone: other contrasts are the same under any."""
    fields = asdict(contrast)
    return fields if contrast.media == CROP else {**fields, "crop_scale": None, "seed": None}


def _hash(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _told(content: Content | MediaError) -> bytes:
    return content.sha256 if isinstance(content, Content) else b"unreadable"
