"""`run.json`: what a run was made of, so that a checkpoint can be traced and a directory told from another run's."""

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mllm.data.examples import Examples
from mllm.data.mixture import Mixture
from mllm.errors import CheckpointError
from mllm.load import checkpoint_directory
from mllm.training.arguments import SftArguments
from mllm.training.preference_options import PreferenceArguments
from mllm.training.sharding import describe_sharding

RUN_RECORD = "run.json"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers")
OURS = ("assembled", "base", "stage.yaml", "preflight.json", f"{Path(RUN_RECORD).stem}.")
"""What may stand in a run's directory before its record: beginnings of names."""

IDENTITY = ("model", "reference", "data", "options", "world_size", "sharding")
"""What has to be equal for a directory to be gone on with."""

DATA_IDENTITY = ("sha256", "rows", "take", "weight")
"""What has to be equal of a data source."""

VOLATILE = (
    "output_dir", "run_name", "report_to", "project", "trackio_space_id", "resume_from_checkpoint", "local_rank",
    "model", "data", "data_root", "disable_tqdm", "save_strategy", "save_steps", "save_total_limit", "log_level",
    "log_level_replica", "log_on_each_node", "logging_dir", "logging_strategy", "logging_steps", "logging_first_step",
    "logging_nan_inf_filter", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory",
    "dataloader_persistent_workers", "ddp_timeout", "ddp_backend", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
    "hub_token", "push_to_hub_token", "skip_memory_metrics", "on_bad", "max_bad_rate",
    "reference_cache", "dry_run", "eval_data", "eval_sample_steps", "eval_strategy", "eval_steps", "eval_on_start",
    "eval_delay", "do_eval", "per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches",
)  # fmt: skip
"""Options that do not decide the outcome, or stand elsewhere in the record."""


def describe_run(args: SftArguments, *, base: Path, rows: Mixture, examples: Examples) -> dict[str, Any]:
    """Everything about a run that decides its outcome, and where it came from.

    Args:
        args: Its options.
        base: Directory of the model it starts from.
        rows: The rows it reads.
        examples: Those it uses.
    """
    return {
        "model": {"path": str(base), "sha256": hash_files(base)},
        "reference": _reference(args),
        "data": rows.fingerprints(),
        "rows": {"used": len(examples), "dropped": dict(examples.dropped), "measure": examples.measure},
        "options": resolved_options(args),
        "world_size": args.world_size,
        "sharding": describe_sharding(args),
        "git": describe_git(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES},
    }


def measure_before(output_dir: Path) -> str | None:
    """How the rows of the run that the directory holds were measured; None without one. See `Examples`."""
    path = output_dir / RUN_RECORD
    return json.loads(path.read_text(encoding="utf-8"))["rows"].get("measure") if path.is_file() else None


def resolved_options(args: SftArguments) -> dict[str, Any]:
    """The options that decide the outcome, as JSON can hold them; where it is written and logged is left out."""
    options = args.to_dict()
    options["parts"] = {name: asdict(chosen) for name, chosen in args.parts.items()}
    options["mixture"] = {"temperature": args.data.temperature, "epoch_rows": args.data.epoch_rows}
    options["feature_cache"] = args.feature_cache is not None  # wherever it lies: without encoders batches differ
    return {name: value for name, value in sorted(options.items()) if name not in VOLATILE}


def hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 of a model's configuration, weights and tokenizer, by file name."""
    kinds = (".safetensors", ".json", ".jinja", ".model")
    return {
        path.name: _hash(path)
        for path in sorted(directory.iterdir())
        if path.suffix in kinds and path.name not in (RUN_RECORD, "complete.json", "trainer_state.json")
    }


def describe_git() -> dict[str, Any] | None:
    """Commit of the checkout this code runs from, and whether it has uncommitted changes; None outside of one."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def claim_directory(output_dir: Path, record: dict[str, Any]) -> None:
    """Write the record of a new run, or check that the directory holds this very run.

    Raises:
        CheckpointError: The directory holds something else.
    """
    path = output_dir / RUN_RECORD
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in IDENTITY if _identity(before, name) != _identity(record, name)]
        if differing:
            raise CheckpointError(
                f"{output_dir} holds a run with other {_explain(before, record, differing)}",
                expected="an empty directory, or this very run to go on with",
                do="choose another `output_dir`, or delete this one yourself",
            )
        return
    refuse_foreign_directory(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)


def refuse_foreign_directory(output_dir: Path) -> None:
    """Before anything is written: the directory is new, empty, or holds a run.

    Raises:
        CheckpointError: It holds files of somebody else's.
    """
    if (output_dir / RUN_RECORD).is_file() or not output_dir.is_dir():
        return
    foreign = sorted(entry.name for entry in output_dir.iterdir() if not entry.name.startswith(OURS))
    if foreign:
        raise CheckpointError(
            f"{output_dir} holds files, but no run, such as {foreign[0]}",
            expected="a new or empty directory",
            do="choose another `output_dir`",
        )


def _reference(args: SftArguments) -> dict[str, Any] | None:
    """Of a preference run the model that it names as its reference; by default that is the one it starts from."""
    if not isinstance(args, PreferenceArguments) or args.reference is None:
        return None
    path = checkpoint_directory(args.reference)
    return {"path": str(path), "sha256": hash_files(path)}


def _identity(record: dict[str, Any], name: str) -> Any:
    """What has to be equal of a record's entry: files count by content, so that a run may be moved."""
    entry = json.loads(json.dumps(record.get(name)))
    if name in ("model", "reference"):
        return (entry or {}).get("sha256")
    if name == "data":
        return [[source.get(key) for key in DATA_IDENTITY] for source in entry or []]
    return entry


def _explain(before: dict[str, Any], now: dict[str, Any], differing: list[str]) -> str:
    """Name the options that differ, where it is only them."""
    if differing != ["options"]:
        return " and ".join(differing)
    old, new = before["options"], json.loads(json.dumps(now["options"]))
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "options: " + ", ".join(f"{name} = {old.get(name)!r}, now {new.get(name)!r}" for name in names[:3])


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
