"""Checkpoints of a run: complete, atomic, loadable, the newest found again."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mllm.checkpoints import COMPLETE, atomic_directory, is_complete, read_complete
from mllm.errors import CheckpointError
from mllm.processing import TrainingProcessor
from mllm.pruning.cross_tokens import PARAMETER, parted, save_cross_tokens
from mllm.training.run_record import RUN_RECORD

PREFIX = "checkpoint-"
FINAL = "final"
STATE_OF_RUN = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json",
    "global_step*", "latest", "zero_to_*.py",  # DeepSpeed's
    "pytorch_model_fsdp*",
)  # fmt: skip
"""What a checkpoint holds to be gone on from; the rest is the model."""


def write_weights(
    directory: Path,
    model: PreTrainedModel | PeftModel,
    processor: TrainingProcessor,
    record: dict[str, Any],
    *,
    base: Path,
    home: Path,
    state_dict: dict | None = None,
) -> None:
    """Everything a checkpoint needs to be loaded: weights or adapter, live processor, `run.json`.

    Args:
        directory: Where to write.
        model: With adapters only these and the parts trained in full are written.
        processor: The one that made the batches.
        record: Content of `run.json`.
        base: Directory of the model the run started from.
        home: Where the checkpoint will stand in the end; an adapter names its base relative to it, so that a run can
            be moved as a whole.
        state_dict: Gathered weights, where the model's own are sharded.
    """
    state_dict, tokens = _without_cross_tokens(model, state_dict)
    if tokens:
        save_cross_tokens(directory, tokens)
    if isinstance(model, PeftModel):
        model.peft_config["default"].base_model_name_or_path = os.path.relpath(base, home)
        model.save_pretrained(directory, state_dict=state_dict, save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # PEFT's blank form; a card is written on export
    else:
        model.save_pretrained(directory, state_dict=state_dict)
    processor.save_pretrained(directory)
    (directory / RUN_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _without_cross_tokens(
    model: PreTrainedModel | PeftModel, state_dict: dict | None
) -> tuple[dict | None, dict[str, torch.Tensor]]:
    """The weights that are written with a model, and its cross tokens, which are written beside them."""
    if not any(name.rpartition(".")[2] == PARAMETER for name, _ in model.named_parameters()):
        return state_dict, {}
    rest, tokens = parted(model.state_dict() if state_dict is None else state_dict)
    return (None if state_dict is None and isinstance(model, PeftModel) else rest), tokens


def require_weights(checkpoint: Path) -> None:
    """Before a checkpoint is called complete.

    Raises:
        CheckpointError: It holds no weights; what shards the run was told to keep them in pieces.
    """
    if not any(checkpoint.glob("*.safetensors")):
        raise CheckpointError(
            f"{checkpoint} was written without weights",
            expected="whole weights, gathered from all processes",
            do="with FSDP set fsdp_state_dict_type: FULL_STATE_DICT, as train/accelerate/fsdp2.yaml does",
        )


def copy_model(checkpoint: Path, final: Path) -> None:
    """Make the model of a run's last checkpoint its final one: all that it holds, but what only going on needs."""
    facts = {"step": (read_complete(checkpoint) or {})["step"]}
    with atomic_directory(final, kind="model", facts=facts) as partial:
        shutil.copytree(
            checkpoint, partial, ignore=shutil.ignore_patterns(*STATE_OF_RUN, COMPLETE), dirs_exist_ok=True
        )


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; half-written ones do not count."""
    found = [path for path in _checkpoints(output_dir) if is_complete(path)]
    return max(found, key=_step, default=None)


def remove_old(output_dir: Path, *, keep: int | None) -> None:
    """Delete all complete checkpoints but the newest `keep`, and what killed runs left half-written."""
    for path in output_dir.glob(f"{PREFIX}*.partial*"):
        shutil.rmtree(path)
    if keep:
        for path in sorted(_checkpoints(output_dir), key=_step)[:-keep]:
            shutil.rmtree(path)


def _checkpoints(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))
