"""Every plan that is shipped parses, and trains two steps a stage on tiny parts of the same families."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mllm.assemble import assemble_checkpoint, assembly_options
from mllm.assemble.options import TOWERS, tower_options
from mllm.assemble.tiles import tile_rule
from mllm.load import load_model
from mllm.models.connectors import connector_options
from mllm.training.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
# Plans that assemble a model. What starts from one, of preferences, is in test_preference_configs.py.
PLANS = [
    path
    for path in sorted((ROOT / "train" / "configs").glob("*.yaml"))
    if "\nmodel:\n" in path.read_text(encoding="utf-8")
]
PUBLISHED = [plan for plan in PLANS if not plan.stem.startswith(("quickstart", "digits"))]
# The others are run, and their dry runs take long; see test_published_recipes.py.
DRY_RUNS = [
    plan if plan.stem in ("llava15", "qwen2_audio_like", "quickstart", "video_llama")
    else pytest.param(plan, marks=pytest.mark.slow)
    for plan in PLANS
]  # fmt: skip
LLAVA, SIGLIP = (ROOT / "train" / "configs" / name for name in ("llava15.yaml", "siglip_qwen25.yaml"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_shipped_plan_parses(plan):
    document = yaml.safe_load(plan.read_text(encoding="utf-8"))
    model = assembly_options(document["model"])
    for tower in (tower_options(kind, model[kind]) for kind in TOWERS if kind in model):
        connector_options(tower.connector)
        tile_rule(getattr(tower, "tiles", None))
    for stage in document["stages"]:
        # `bf16: true` needs a GPU, or to be told that there is none.
        arguments = parse_arguments(["--config", str(plan), "--stage", stage["name"], "--use_cpu", "true"])
        assert arguments.parts and arguments.data


@pytest.mark.parametrize("plan", DRY_RUNS, ids=lambda path: path.stem)
def test_shipped_plan_passes_a_dry_run(
    plan, tmp_path, train_by_hand, tiny_model_options, tiny_plan_rows, tiny_stage_parts
):
    rows = tiny_plan_rows(tmp_path, plan)
    model = assemble_checkpoint(tmp_path / "model", **tiny_model_options(tmp_path, plan))
    for stage in yaml.safe_load(plan.read_text(encoding="utf-8"))["stages"]:
        out = tmp_path / stage["name"]
        command = ["--config", plan, "--stage", stage["name"], "--model", model, "--data", f"[{rows}]"]
        command += ["--parts", tiny_stage_parts(stage)]
        train_by_hand([*map(str, command), "--output_dir", str(out), "--use_cpu", "true", "--dry_run"])
        report = json.loads((out / "preflight.json").read_text())
        trained = {part["name"] for part in report["parts"] if part["trained"]}
        assert trained == {name for name, mode in stage["parts"].items() if mode != "frozen"}
        assert report["steps"]["total"] > 0 and report["memory"]["total"] > 0


def test_llava15_trains_on_tiny_parts(tmp_path, tiny_changes):
    changes = tiny_changes(tmp_path, LLAVA)
    command = [sys.executable, ROOT / "train" / "run.py", LLAVA, "--output_dir", tmp_path / "out", "--set", *changes]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    check(tmp_path / "out", names=["align", "sft"])
    assert "were not passed to `accelerate launch`" not in run.stderr


def test_siglip_qwen25_trains_on_tiny_parts(tmp_path, run_plan, tiny_changes):
    assert run_plan(SIGLIP, tmp_path / "out", *tiny_changes(tmp_path, SIGLIP)) == ["align", "sft"]
    check(tmp_path / "out", names=["align", "sft"])
    adapter = json.loads((tmp_path / "out" / "sft" / "final" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (128, 256, 0.05)


@pytest.mark.parametrize("plan", PUBLISHED, ids=lambda path: path.stem)
def test_plan_says_where_it_comes_from(plan):
    """Its source, what differs from it, and a place in the table of plans."""
    text = plan.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert "github.com/" in text
    assert "eviations" in text or "No published run is reproduced" in text or "not its run" in text
    assert f"(../train/configs/{plan.name})" in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_sft_explains_itself_under_accelerate_launch():
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "train/accelerate/cpu.yaml"]
    command += ["train/sft.py", "--config", "train/configs/llava15.yaml", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: train/sft.py") and "--learning_rate" in run.stdout


def check(out: Path, *, names: list[str]) -> None:
    stages = json.loads((out / "plan.json").read_text())["stages"]
    assert [(stage["name"], stage["status"], stage["steps"]) for stage in stages] == [
        (name, "done", 2) for name in names
    ]
    assert all(stage["first_loss"] > 0 for stage in stages)
    load_model(out / names[-1] / "final")
