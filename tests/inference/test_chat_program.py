"""The terminal chat as people start it."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from mllm.testing_media import write_tiny_video
from mllm.testing_sounds import sine, write_wav

ROOT = Path(__file__).parents[2]


def _chat(*arguments, lines: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/chat.py", *map(str, arguments)]
    return subprocess.run(command, input=lines, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_piped_questions_are_answered(listener, tmp_path):
    model, processor = listener
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture, sound = tmp_path / "scene.png", write_wav(tmp_path / "tone.wav", sine(1.5))
    Image.new("RGB", (20, 12), "red").save(picture)
    video = write_tiny_video(tmp_path / "clip.mp4", frames=6)
    lines = (
        f"What is in the picture?\nAnd a literal <image>?\n/new\n/image {picture}\n/video {video}\nIs it red?\n"
        f"/audio {sound}\nAnd that?\n/quit\nnever asked\n"
    )
    run = _chat(tmp_path / "model", "--image", picture, "--audio", sound, "--max_new_tokens", "4", lines=lines)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert "Traceback" not in run.stderr


def test_a_missing_picture_ends_with_one_message(assembled, tmp_path):
    run = _chat(assembled, "--image", tmp_path / "none.png", lines="hi\n")
    assert run.returncode == 2
    assert "none.png" in run.stderr and "Traceback" not in run.stderr


def test_a_sound_for_a_model_that_hears_nothing_ends_with_one_message(assembled, tmp_path):
    sound = write_wav(tmp_path / "tone.wav", sine(0.5))
    run = _chat(assembled, "--audio", sound, lines="What do you hear?\n")
    assert run.returncode == 2
    assert "audio, which the model does not read" in run.stderr and "Traceback" not in run.stderr
