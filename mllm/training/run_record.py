"""`run.json`: what a run was made of, so that a checkpoint can be traced and a directory told from another run's."""

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mllm.errors import CheckpointError
from mllm.training.arguments import SftArguments

RUN_RECORD = "run.json"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers")
IDENTITY = ("model", "data", "options", "world_size")
"""What has to be equal for a directory to be gone on with."""

VOLATILE = ("output_dir", "logging_dir", "run_name", "report_to", "resume_from_checkpoint", "local_rank", "data_root")
"""Options that do not decide the outcome."""


def describe_run(
    *, model: Path, data: list[dict[str, Any]], options: dict[str, Any], rows: dict[str, Any], world_size: int
) -> dict[str, Any]:
    """Everything about a run that decides its outcome, and where it came from.

    Args:
        model: Directory of the model it starts from.
        data: Path, number of rows and hash of every source.
        options: The resolved options.
        rows: How many are used, and dropped for which reason.
        world_size: Number of processes.
    """
    return {
        "model": {"path": str(model), "sha256": hash_files(model)},
        "data": data,
        "rows": rows,
        "options": options,
        "world_size": world_size,
        "git": describe_git(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES},
    }


def resolved_options(args: SftArguments) -> dict[str, Any]:
    """The options that decide the outcome, as JSON can hold them; where it is written and logged is left out."""
    options = args.to_dict()
    options["parts"] = {name: asdict(chosen) for name, chosen in args.parts.items()}
    options["data"] = [{"path": str(source.path), "first": source.first} for source in args.data]
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
        differing = [name for name in IDENTITY if before.get(name) != json.loads(json.dumps(record[name]))]
        if differing:
            raise CheckpointError(
                f"{output_dir} holds a run with other {_explain(before, record, differing)}",
                expected="an empty directory, or this very run to go on with",
                do="choose another `output_dir`, or delete this one yourself",
            )
        return
    if output_dir.is_dir() and any(
        entry.name not in ("assembled", "base", "stage.yaml") for entry in output_dir.iterdir()
    ):
        raise CheckpointError(
            f"{output_dir} holds files, but no run",
            expected="a new or empty directory",
            do="choose another `output_dir`",
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.rename(path)


def _explain(before: dict[str, Any], now: dict[str, Any], differing: list[str]) -> str:
    """Name the options that differ, where it is only them."""
    if differing != ["options"]:
        return " and ".join(name for name in differing)
    old, new = before["options"], json.loads(json.dumps(now["options"]))
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "options: " + ", ".join(f"{name} = {old.get(name)!r}, now {new.get(name)!r}" for name in names[:3])


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
