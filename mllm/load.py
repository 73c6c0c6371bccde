"""Read checkpoints: composed and stock models, adapters, and the processor that belongs to them."""

import hashlib
import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, PreTrainedModel

from mllm.errors import CheckpointError, OptionError
from mllm.models import MllmConfig, MllmForConditionalGeneration
from mllm.models.parts import four_bit_config, four_bit_modules, keep_as_loaded
from mllm.models.stock_parts import STOCK_PARTS
from mllm.processing import MllmProcessor, StockProcessor, TrainingProcessor
from mllm.processing.stock_loading import processor_name

ADAPTER_CONFIG = "adapter_config.json"
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
"""What is fetched of a model on the Hub: no pickles, and no code."""

# Here, and not beside the class: processing does not know the models' configuration.
AutoProcessor.register(MllmConfig, MllmProcessor)


def load_processor(path: str | Path, *, chat_template: str | None = None) -> TrainingProcessor:
    """Load the processor saved in a checkpoint, of a composed model or of a stock one.

    Args:
        path: A checkpoint directory, or the Hub id of a complete model.
        chat_template: For a stock one whose template cannot be trained with: a name or a text, see
            `mllm.processing.stock_templates`.

    Raises:
        CheckpointError: `path` is no checkpoint, or its processor is of a family that is not known.
        OptionError: There is no chat template to train a stock model with.
    """
    directory = checkpoint_directory(path)
    if processor_name(directory) == MllmProcessor.__name__:
        if chat_template is not None:
            raise OptionError(
                f"chat_template = {chat_template[:60]!r} for {path}, which was composed here",
                expected="none: a composed model has the template that it was assembled with",
                do="leave it out, or give it under `model` to assemble with",
            )
        return MllmProcessor.from_pretrained(str(directory))
    return StockProcessor.from_pretrained(directory, chat_template=chat_template)


def checkpoint_directory(path: str | Path) -> Path:
    """Where a checkpoint lies: the directory itself, or a copy of what the Hub has under this id.

    Raises:
        CheckpointError: There is no finished checkpoint.
    """
    _check_is_checkpoint(path)
    if Path(path).exists():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(HUB_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{path}: {str(error).splitlines()[0]}",
            expected="a directory, or the id of a model that the Hub, or its cache on this machine, has",
            do="correct the path or the id; for a private model, log in with `hf auth login`",
        ) from error


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trainable: bool = False,
    quantize: Collection[str] = (),
) -> PreTrainedModel | PeftModel:
    """Load a model of ours or of transformers, or the adapter on its base model where `path` holds an adapter.

    Every key must be found and none may be left over.

    Args:
        path: A checkpoint directory, or the Hub id of a complete model.
        dtype: Type of the weights; "auto" for the saved one.
        device: Where to put the model; the CPU by default.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; transformers' choice by default.
        trainable: Whether an adapter's weights should require gradients.
        quantize: Names of parts whose linear layers are held in 4 bits (see `mllm.models.parts`). An adapter trained
            on such weights is loaded on the unquantized ones without it.

    Raises:
        CheckpointError: The directory is unfinished or no checkpoint, or keys do not match.
        OptionError: `quantize` names no part with linear layers, or bitsandbytes is not installed.
    """
    path = checkpoint_directory(path)
    adapter = _read_adapter_config(path)
    base = base_model_path(path) if adapter else path
    model, info = _model_class(base).from_pretrained(
        str(base), dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True,
        **_quantization(base, quantize, dtype=dtype, device=device),
    )  # fmt: skip
    _check_keys(info, base)
    keep_as_loaded(model)
    if adapter:
        model = _with_adapter(model, path, base, trainable=trainable)
    return model.to(device) if device is not None and not quantize else model


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


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The plain model: with adapters added into the weights they adapt, and trained copies in place of originals.

    Raises:
        CheckpointError: The weights are held in 4 bits.
    """
    if quantized := four_bit_modules(model):
        raise CheckpointError(
            f"{len(quantized)} modules of the model are held in 4 bits (such as {quantized[0]}), and cannot be merged",
            expected="the adapter on the base model's own weights: merging would round the adapter to 4 bits as well",
            do="load it without `quantize`; then it is merged into the weights that the 4 bits were made from",
        )
    if not isinstance(model, PeftModel):
        return model
    return model.merge_and_unload(safe_merge=True)


def _quantization(
    base: str | Path, parts: Collection[str], *, dtype: torch.dtype | str, device: str | torch.device | None
) -> dict[str, Any]:
    """What `from_pretrained` is told in addition where parts are held in 4 bits."""
    if not parts:
        return {}
    config = AutoConfig.from_pretrained(str(base))
    with torch.device("meta"):
        skeleton = AutoModelForMultimodalLM.from_config(config)
    compute = (config.dtype or torch.float32) if dtype == "auto" else dtype
    compute = getattr(torch, compute) if isinstance(compute, str) else compute
    return {
        "quantization_config": four_bit_config(skeleton, parts, compute_dtype=compute),
        "device_map": {"": device or "cpu"},
    }


def _with_adapter(model: PreTrainedModel, path: Path, base: Path, *, trainable: bool) -> PeftModel:
    """The adapter on its base model; PEFT alone would leave behind what finds no place, and go on."""
    _check_base(path, base)
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        raise CheckpointError(
            f"{path} has no {weights.name}",
            expected="an adapter's weights in that file; pickled ones (adapter_model.bin) are not read",
            do="restore the checkpoint, or save the adapter anew with PEFT, which writes that file",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name it is about to drop
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # they are an error below
            adapted = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    except (ValueError, RuntimeError, KeyError) as error:
        raise _foreign_adapter(path, base, str(error).splitlines()[0]) from error
    with safe_open(str(weights), "pt") as file:
        saved = set(file.keys())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if differing := sorted(saved ^ found):
        raise _foreign_adapter(path, base, f"{len(differing)} weights of one are not in the other ({differing[0]})")
    return adapted


def _check_base(path: Path, base: Path) -> None:
    """The base has the configuration that the run recorded, where it is there to be compared."""
    file = path / "run.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    expected = record.get("model", {}).get("sha256", {}).get("config.json")
    if expected not in (None, hashlib.sha256((base / "config.json").read_bytes()).hexdigest()):
        raise _foreign_adapter(path, base, "its config.json is not the one that was trained on")


def _foreign_adapter(path: Path, base: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter in {path} does not fit the model in {base}: {reason}",
        expected="the model that the adapter was trained on",
        do=f"put that model back, or correct `base_model_name_or_path` in {path / ADAPTER_CONFIG}",
    )


def _model_class(directory: str | Path) -> Any:
    """Ours, or the Auto class that has all stock models which can be trained; never code from a checkpoint."""
    model_type = json.loads(Path(directory, "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type == MllmConfig.model_type:
        return MllmForConditionalGeneration
    if model_type not in STOCK_PARTS:
        raise CheckpointError(
            f"{directory} holds a model of type {model_type!r}",
            expected=f"a composed model, or one of {', '.join(STOCK_PARTS)}, in transformers' own form",
            do="choose another checkpoint; a language model alone becomes part of one by `mllm.assemble`",
        )
    return AutoModelForMultimodalLM


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
