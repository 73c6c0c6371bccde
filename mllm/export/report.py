"""What an export tells about itself: `export_report.json`."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers

from mllm import __version__
from mllm.checkpoints import COMPLETE
from mllm.errors import CheckpointError

REPORT = "export_report.json"
CARD = "README.md"


@dataclass(frozen=True)
class ExportReport:
    """How an export compares with the model it was made from, and what it consists of.

    Args:
        architecture: The stock class.
        dtype: Type of the written weights.
        trained_dtype: Type the model was trained in.
        num_parameters: Parameters, tied ones once.
        num_probes: Conversations compared in a fresh process.
        max_abs_diff: Largest difference of logits between the export and the model in the export's type.
        tolerance: What `max_abs_diff` was held to; 0 in float32.
        same_tokens: Whether prompt ids and greedy continuations were equal on every probe. Always so in float32; in a
            short type, a continuation may part where the two best tokens are as good as equal.
        merge_max_abs_diff: Largest difference of logits between the adapter and the merged model, both in float32;
            None without an adapter.
        rounding_max_abs_diff: Largest difference of logits made by rounding to `dtype`; None where nothing was.
        versions: Of the libraries it was written and verified with.
        files: Size in bytes and SHA-256 of every file but report, `complete.json` and card, which may be edited.
        seconds: Wall-clock time of the export, its verification included.
    """

    architecture: str
    dtype: str
    trained_dtype: str
    num_parameters: int
    num_probes: int
    max_abs_diff: float
    tolerance: float
    same_tokens: bool
    merge_max_abs_diff: float | None
    rounding_max_abs_diff: float | None
    versions: dict[str, str]
    files: dict[str, dict[str, int | str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(int(facts["bytes"]) for facts in self.files.values())


def write_report(directory: Path, report: ExportReport) -> None:
    """Write the report into the export it is about."""
    (directory / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


def read_report(directory: str | Path) -> ExportReport:
    """Read an export's report.

    Raises:
        CheckpointError: There is none.
    """
    file = Path(directory) / REPORT
    if not file.is_file():
        raise CheckpointError(
            f"{directory} has no {REPORT}",
            expected="a directory written by `mllm.export.export`",
            do="export the model with scripts/export.py",
        )
    return ExportReport(**json.loads(file.read_text(encoding="utf-8")))


def describe_files(directory: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of every file below `directory`, without card, report and completion mark."""
    left_out = {directory / name for name in (CARD, REPORT, COMPLETE)}
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path not in left_out]
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
    }


def library_versions() -> dict[str, str]:
    """Versions that may matter to whoever cannot load the export."""
    return {"mllm": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
