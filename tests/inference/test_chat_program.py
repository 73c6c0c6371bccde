"""The terminal chat as people start it."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def _chat(*arguments, lines: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/chat.py", *map(str, arguments)]
    return subprocess.run(command, input=lines, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_piped_questions_are_answered(assembled, tmp_path):
    picture = tmp_path / "scene.png"
    Image.new("RGB", (20, 12), "red").save(picture)
    lines = (
        f"What is in the picture?\nAnd a literal <image>?\n/new\n/image {picture}\nIs it red?\n/quit\nnever asked\n"
    )
    run = _chat(assembled, "--image", picture, "--max_new_tokens", "4", lines=lines)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert "Traceback" not in run.stderr


def test_a_missing_picture_ends_with_one_message(assembled, tmp_path):
    run = _chat(assembled, "--image", tmp_path / "none.png", lines="hi\n")
    assert run.returncode == 2
    assert "none.png" in run.stderr and "Traceback" not in run.stderr
