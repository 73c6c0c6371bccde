"""scripts/export.py, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "scripts" / "export.py"


@pytest.mark.slow
def test_program_exports_and_compares_rows(assembled, rows, tmp_path):
    done = _run(assembled, "--out", tmp_path / "out", "--rows", rows, "--num_rows", "5", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "over 5 conversations" in done.stdout
    assert "the same" in done.stdout
    report = json.loads((tmp_path / "out" / "export_report.json").read_text(encoding="utf-8"))
    assert (report["num_probes"], report["max_abs_diff"], report["same_tokens"]) == (5, 0.0, True)
    again = _run(assembled, "--out", tmp_path / "out")
    assert again.returncode == 2
    assert "exists already" in again.stderr and "Traceback" not in again.stderr


def _run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
