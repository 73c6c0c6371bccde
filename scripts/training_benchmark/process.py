"""One trial in a process of its own: what it is told, what it answers, and how much memory it held."""

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mllm.errors import MllmError

SAID = (
    "side", "preset", "precomputed", "mode", "batching", "pack_length", "batch_rows", "workers", "sampling",
    "num_rows", "feature_cache",
)  # fmt: skip
UNSAID = ("order", "lengths", "model", "rows")
ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "pillow")
Trial = Callable[[dict[str, Any]], dict[str, Any]]
"""Runs what a spec describes, and returns the spec with what was measured."""


def runner(threads: int) -> Trial:
    """What runs a trial and says how it went; only one with `may_fail` may fail."""

    def trial(spec: dict[str, Any]) -> dict[str, Any]:
        found = in_new_process(spec, threads=threads)
        choice = {name: found[name] for name in SAID if name in found}
        speed = f"{found['rows_per_second']:.3g} rows/s, " if "rows_per_second" in found else ""
        peak = f"{found['peak_mib']:.0f} MiB, " if "peak_mib" in found else ""
        said = "failed, " if "error" in found else speed + peak
        print(f"{choice}: {said}process {found['process_seconds']:.0f} s", flush=True)
        if "error" in found and not spec.get("may_fail"):
            raise RuntimeError(f"a trial failed: {choice}\n{found['error']}")
        return {name: value for name, value in found.items() if name not in UNSAID}

    return trial


def in_new_process(spec: dict[str, Any], *, threads: int) -> dict[str, Any]:
    """Run one trial alone; returns the spec with what was measured, or with `error` where it failed."""
    paths = [str(ROOT / "scripts"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "MLLM_CACHE": str(Path(scratch, "cache")),  # the rows are indexed anew in every trial: TRL keeps nothing
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        asked, answer = Path(scratch, "spec.json"), Path(scratch, "answer.json")
        asked.write_text(json.dumps(spec | {"scratch": scratch}), encoding="utf-8")
        start = time.perf_counter()
        command = [sys.executable, "-m", "training_benchmark.trial", str(asked), str(answer)]
        run = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if run.returncode or not answer.is_file():
            return spec | {"error": (run.stderr or run.stdout)[-3000:], "process_seconds": seconds}
        measured = json.loads(answer.read_text(encoding="utf-8"))
    return spec | measured | {"process_seconds": seconds}


def machine(threads: int | None, *, libraries: tuple[str, ...] = LIBRARIES) -> dict[str, Any]:
    """What the figures were measured on, and with.

    Raises:
        MllmError: TRL is among the libraries, and is not installed.
    """
    if "trl" in libraries and find_spec("trl") is None:
        raise MllmError(
            "no TRL to compare with", expected="the extra `bench`", do="install it: pip install --editable '.[bench]'"
        )
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads or os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def start_counting_memory() -> float:
    """Forget earlier peaks of this process; returns what it holds now, in MiB. Call it after the imports."""
    with contextlib.suppress(OSError):  # then the peak of the imports stays; it is far below that of training
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return memory_mib("VmRSS")


def memory_mib(name: str) -> float:
    """`VmRSS`, what this process holds, or `VmHWM`, the most it held; not a number where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return float("nan")
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 2**10


def cuda_peak_mib() -> float | None:
    """The most memory that tensors held on the first GPU; None without one."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
