"""scripts/evaluate_model.py as people start it: with fewer items, without blank media, from fewer visual tokens."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm.pruning.picture import SIDE
from mllm.testing import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """A directory with a tiny model and rows of two tasks."""
    out = tmp_path_factory.mktemp("evaluation")
    model, processor = tiny_model(out / "parts")
    model.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    (out / "rows").mkdir()
    for task, question in (("count", "How many digits are green?"), ("color", "Which colour has the 4?")):
        with (out / "rows" / f"{task}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(3):
                pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(out / "rows" / f"{number}.png")
                content = [{"type": "image"}, {"type": "text", "text": question}]
                messages = [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": [{"type": "text", "text": str(number)}]},
                ]
                media = [{"kind": "image", "path": f"{number}.png"}]
                row = {"id": f"{task}-{number}", "source": "test", "messages": messages, "media": media}
                file.write(json.dumps(row | {"meta": {"answer": str(number)}}) + "\n")
    return out


def evaluate(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/evaluate_model.py", out / "model", "--rows", out / "rows"]
    return subprocess.run(
        [*command, "--out", out / "evaluation.json", "--tasks", "count", "color", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_pruners_are_scored_beside_the_model_itself(evaluation):
    pruners = ["--pruner", "uniform", "tokens=2", "--pruner", "random tokens=0.5"]
    run = evaluate(evaluation, "--no_blank", "--items", "2", *pruners, "--picture", evaluation / "left.png")
    assert run.returncode == 0, run.stderr
    report = json.loads((evaluation / "evaluation.json").read_text())
    assert {task: found["items"] for task, found in report["tasks"].items()} == {"count": 2, "color": 2}
    assert all(len(found["answers"]) == 2 for found in report["tasks"].values())
    cases = report["pruned"]
    assert [case["pruner"] for case in cases] == ["uniform tokens=2", "random tokens=0.5"]
    of = cases[0]["of"]
    assert of > 2 and [case["tokens"] for case in cases] == [2, of // 2]
    assert all(set(case["tasks"]) == {"count", "color"} for case in cases)
    assert [line.split()[0] for line in run.stdout.splitlines()[-3:]] == ["visual", "uniform", "random"]
    assert Image.open(evaluation / "left.png").height > 2 * SIDE


def test_blank_media_and_no_pruner_are_what_there_is_without_options(evaluation):
    run = evaluate(evaluation)
    assert run.returncode == 0, run.stderr
    report = json.loads((evaluation / "evaluation.json").read_text())
    assert report["pruned"] == [] and "visual tokens" not in run.stdout
    assert all(found["items"] == 3 and found["baseline"] for found in report["tasks"].values())


def test_a_pruner_that_cannot_be_is_refused_before_the_model_is_loaded(evaluation):
    run = evaluate(evaluation, "--pruner", "uniform", "share=2")
    assert run.returncode == 2
    assert "'share', which it does not have" in run.stderr and "Traceback" not in run.stderr
