"""The published recipes that are shipped train two steps a stage, on tiny parts of the same families."""

import json
from pathlib import Path

import pytest
import yaml

from mllm.load import load_model, load_processor

CONFIGS = Path(__file__).parents[2] / "train" / "configs"
NAMES = (
    "blip2", "instructblip", "llava_next", "qwen2_audio_like", "sharegpt4v", "sphinx", "video_llama_audio",
    pytest.param("video_llama", marks=pytest.mark.slow),  # the first half of video_llama_audio
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_on_tiny_parts(name, tmp_path, run_plan, tiny_changes):
    plan = CONFIGS / f"{name}.yaml"
    document = yaml.safe_load(plan.read_text(encoding="utf-8"))
    names = [stage["name"] for stage in document["stages"]]
    changes = tiny_changes(tmp_path, plan)
    assert run_plan(plan, tmp_path / "out", *changes) == names
    stages = json.loads((tmp_path / "out" / "plan.json").read_text())["stages"]
    assert [(stage["name"], stage["status"], stage["steps"]) for stage in stages] == [
        (one, "done", 2) for one in names
    ]
    assert all(stage["first_loss"] > 0 for stage in stages)
    for name in names:  # no row was left out because of its media
        rows = json.loads((tmp_path / "out" / name / "final" / "run.json").read_text())["rows"]
        assert rows["used"] > 0 == len(rows["dropped"]), rows
    load_model(tmp_path / "out" / names[-1] / "final")
    kinds = load_processor(tmp_path / "out" / names[-1] / "final").media_kinds
    assert kinds == tuple(kind for kind in ("image", "audio", "video") if kind in document["model"])
