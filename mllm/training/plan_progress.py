"""How far a plan has come: `plan.json`, which stages are done, and that these are still what the plan says."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mllm.checkpoints import is_complete, read_complete
from mllm.errors import CheckpointError
from mllm.load import ADAPTER_CONFIG
from mllm.training.callbacks import LOG
from mllm.training.checkpoint import latest_checkpoint
from mllm.training.plan import Plan, Stage
from mllm.training.run_record import DATA_IDENTITY, RUN_RECORD, VOLATILE, hash_files, resolved_options
from mllm.training.start import assemble_once

PLAN_RECORD = "plan.json"


class PlanProgress:
    """What an output directory holds of a plan. Making one writes nothing.

    Args:
        plan: The plan as it is now.

    Raises:
        CheckpointError: The directory holds something else, or a stage begun with other options, data or input.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.path = plan.output_dir / PLAN_RECORD
        recorded = self._read()
        self.assemble_seconds: float | None = recorded.get("assemble_seconds")
        before = {entry["name"]: entry for entry in recorded["stages"]}
        # What is recorded of a stage counts while its directory is there.
        self.records = {
            stage.name: before[stage.name]
            for stage in plan.stages
            if stage.directory.is_dir() and stage.name in before
        }
        self.inputs: dict[str, dict[str, str]] = {}  # hashed once: a finished model never changes
        if plan.model and is_complete(plan.assembled, kind="model"):
            assemble_once(plan.assembled, plan.model)  # raises where other parts stand there
        for stage in plan.stages:
            self.check_unchanged(stage)

    def assemble(self) -> None:
        """Join the parts, unless that was done before or the first stage starts from a checkpoint."""
        if self.plan.model and not is_complete(self.plan.assembled, kind="model"):
            start = time.perf_counter()
            assemble_once(self.plan.assembled, self.plan.model)
            self.assemble_seconds = time.perf_counter() - start

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage is finished and still what the plan says; nothing is started for it then.

        Raises:
            CheckpointError: Its options, data or input have changed.
        """
        self.check_unchanged(stage)
        if not is_complete(stage.final, kind="model"):
            return False
        self._update(stage, status="skipped")
        return True

    def check_unchanged(self, stage: Stage) -> None:
        """Compare a stage that was begun with the plan.

        Raises:
            CheckpointError: Naming what differs.
        """
        is_merged = (stage.directory / "base").exists()
        if not is_begun(stage) and not is_merged:
            return
        if stage.name not in self.records:
            raise CheckpointError(
                f"{stage.directory} holds a run that {self.path} does not know",
                expected="an empty directory, or a stage that this plan has begun",
                do="choose another --output_dir, or delete this one yourself",
            )
        before, now = self.records[stage.name], self._describe(stage)
        differing = list(_differences(before, now)) if is_begun(stage) else []
        # An input that is not there yet is compared when it is.
        if now["input"] is not None and before["input"] != now["input"]:
            differing.append("input: the model it starts from was trained or assembled anew")
        if differing:
            raise CheckpointError(
                f"stage {stage.name!r} was begun in {stage.directory} with other {'; '.join(differing[:3])}",
                expected="the same options, row files and starting model as when it was begun",
                do="undo the change, choose another --output_dir, or delete the directory of this stage and of those "
                "after it yourself, to train them anew",
            )

    @contextmanager
    def attempt(self, stage: Stage) -> Iterator[None]:
        """Write the stage's YAML before and how it went after; seconds add up over attempts that could say so."""
        seconds = self.records[stage.name]["seconds"] if is_begun(stage) else 0.0
        is_resumed = stage.directory.is_dir() and latest_checkpoint(stage.directory) is not None
        stage.directory.mkdir(parents=True, exist_ok=True)
        _write(stage.config, yaml.safe_dump(stage.options, sort_keys=False, allow_unicode=True))
        self.records[stage.name] = {"name": stage.name, "seconds": seconds} | self._describe(stage)
        self._update(stage, status="running")
        start, status = time.perf_counter(), "failed"
        try:
            yield
            status = "resumed" if is_resumed else "done"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self._update(stage, status=status, seconds=seconds + time.perf_counter() - start, **read_log(stage))

    def table(self) -> str:
        """Stages, one a line."""
        lines = [("stage", "status", "seconds", "steps", "loss: first", "last")]
        for stage in self.plan.stages:
            record = self.records.get(stage.name, {"status": "to do"})
            shown = [record.get(key) for key in ("seconds", "steps", "first_loss", "last_loss")]
            cells = ["-" if value is None else format(value, form) for value, form in zip(shown, FORMATS, strict=True)]
            lines.append((stage.name, record["status"], *cells))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )

    def _describe(self, stage: Stage) -> dict[str, Any]:
        """What decides the outcome of a stage: options that are stated, content of row files, files of its input."""
        if stage.name not in self.inputs and is_there(stage.model):
            self.inputs[stage.name] = hash_files(stage.model)
        typed = json.loads(json.dumps(resolved_options(stage.arguments)))
        options = {name: typed[name] for name in sorted({*stage.given, "parts", "mixture"}) if name in typed}
        return {
            "options": options if stage.program == "sft" else options | {"program": stage.program},
            "data": [{key: file[key] for key in DATA_IDENTITY} for file in stage.data],
            "files": [file["path"] for file in stage.data],
            "input": self.inputs.get(stage.name),
        }

    def _update(self, stage: Stage, **facts: Any) -> None:
        self.records[stage.name] |= facts
        record = {
            "plan": str(self.plan.path.resolve()),
            "model": self.plan.model,
            "assemble_seconds": self.assemble_seconds,
            "stages": [self.records[stage.name] for stage in self.plan.stages if stage.name in self.records],
        }
        _write(self.path, json.dumps(record, indent=2) + "\n")

    def _read(self) -> dict[str, Any]:
        out = self.plan.output_dir
        if self.path.is_file():
            return json.loads(self.path.read_text(encoding="utf-8"))
        # A plan that was stopped while it was assembling leaves no more than that.
        if out.exists() and not (out.is_dir() and all(path.name.startswith("assembled") for path in out.iterdir())):
            raise CheckpointError(
                f"{out} holds files, but no {PLAN_RECORD}",
                expected="a new or empty directory, or one that a plan has begun",
                do="choose another --output_dir",
            )
        return {"stages": []}


FORMATS = (".1f", "d", ".4f", ".4f")


def is_begun(stage: Stage) -> bool:
    """Whether training has claimed the stage's directory."""
    return (stage.directory / RUN_RECORD).is_file()


def is_there(model: Path) -> bool:
    """Whether a model or an adapter stands in a directory."""
    return any((model / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def read_log(stage: Stage) -> dict[str, Any]:
    """Steps, first and last loss of a stage, as far as it came."""
    log = stage.directory / LOG
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    losses = [line["loss"] for line in lines if "loss" in line]
    steps = (read_complete(stage.final) or {}).get("step") or max((line["step"] for line in lines), default=None)
    return {"steps": steps} | ({"first_loss": losses[0], "last_loss": losses[-1]} if losses else {})


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    old, new = _flat(before["options"]), _flat(now["options"])
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and name not in VOLATILE:
            yield f"options: {name} = {old.get(name)!r}, now {new.get(name)!r}"
    if before["data"] != now["data"]:
        pairs = zip(before["data"], now["data"], strict=False)
        changed = [path for path, (was, is_) in zip(now["files"], pairs, strict=False) if was != is_]
        yield f"data: {', '.join(changed) or 'the number of files'}"


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"parts": {"text": {"rank": 4}}}` as `{"parts.text.rank": 4}`."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _write(path: Path, text: str) -> None:
    """Write it beside and rename: a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
