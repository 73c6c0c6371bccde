"""Read checkpoints: assembled and trained models, adapters, and the processor that belongs to them."""

import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoProcessor, PreTrainedModel

from mllm.errors import CheckpointError
from mllm.models import MllmConfig, MllmForConditionalGeneration
from mllm.processing import MllmProcessor

ADAPTER_CONFIG = "adapter_config.json"

# Here, and not beside the class: processing does not know the models' configuration.
AutoProcessor.register(MllmConfig, MllmProcessor)


def load_processor(path: str | Path) -> MllmProcessor:
    """Load the processor saved in a checkpoint.

    Raises:
        CheckpointError: `path` is no checkpoint of ours.
    """
    _check_is_checkpoint(path)
    return MllmProcessor.from_pretrained(str(path))


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trainable: bool = False,
) -> MllmForConditionalGeneration | PeftModel:
    """Load a model, or the adapter on its base model where `path` holds an adapter.

    Every key must be found and none may be left over.

    Args:
        path: A checkpoint directory, or the Hub id of a complete model.
        dtype: Type of the weights; "auto" for the saved one.
        device: Where to put the model; the CPU by default.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; transformers' choice by default.
        trainable: Whether an adapter's weights should require gradients.

    Raises:
        CheckpointError: The directory is unfinished or no checkpoint, or keys do not match.
    """
    _check_is_checkpoint(path)
    adapter = _read_adapter_config(path)
    base = base_model_path(path) if adapter else path
    model, info = MllmForConditionalGeneration.from_pretrained(
        str(base), dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
    )
    _check_keys(info, base)
    if adapter:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name it is about to drop
            model = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    return model.to(device) if device is not None else model


def base_model_path(path: str | Path) -> Path:
    """The directory of the model that the adapter in `path` belongs to.

    Raises:
        CheckpointError: The adapter's base model is not where the adapter says.
    """
    named = (_read_adapter_config(path) or {})["base_model_name_or_path"]
    base = Path(path, named).resolve()
    if not (base / "config.json").is_file():
        raise CheckpointError(
            f"{path} is an adapter of {named}, which is not there (looked at {base})",
            expected="the base model's directory under that path",
            do=f"put it back, or correct `base_model_name_or_path` in {Path(path) / ADAPTER_CONFIG}",
        )
    return base


def merged(model: PreTrainedModel | PeftModel) -> MllmForConditionalGeneration:
    """The plain model: with adapters added into the weights they adapt, and trained copies in place of originals."""
    if not isinstance(model, PeftModel):
        return model
    return model.merge_and_unload(safe_merge=True)


def _read_adapter_config(path: str | Path) -> dict | None:
    file = Path(path) / ADAPTER_CONFIG
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _check_is_checkpoint(path: str | Path) -> None:
    """A directory has to be a finished checkpoint; whatever is no directory is taken for a Hub id."""
    directory = Path(path)
    looks_local = directory.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1
    if not directory.exists() and not looks_local:
        return
    has_weights = (directory / "config.json").is_file() or (directory / ADAPTER_CONFIG).is_file()
    if ".partial-" in directory.name or not has_weights:
        raise CheckpointError(
            f"{path} holds no finished checkpoint",
            expected="a directory with config.json or adapter_config.json, as assembling and training write it",
            do="name the directory of an assembled model, or the `final` directory of a training run",
        )


def _check_keys(info: dict, path: str | Path) -> None:
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise CheckpointError(
            f"the weights in {path} do not fit its config.json: "
            + "; ".join(f"{kind} {keys[:3]}" for kind, keys in wrong.items() if keys),
            expected="exactly the weights of the model that config.json describes",
            do="restore the checkpoint; no weight is ever left at random or dropped",
        )
