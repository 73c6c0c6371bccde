"""A plan equals its stages run by hand; what is done is not done again; a kill costs nothing but time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from mllm.assemble import assemble_checkpoint
from mllm.errors import CheckpointError, MllmError, OptionError
from mllm.testing import save_tiny_parts, save_tiny_rows
from mllm.training.plan import apply_change, read_plan

ROOT = Path(__file__).parents[2]
NAMES = ["align", "sft", "more"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Tiny parts, rows, and a plan: a connector, then adapters, then a stage that starts from the adapters."""
    root = tmp_path_factory.mktemp("plan")
    save_tiny_rows(root / "rows")
    lora = {"image.connector": {"mode": "full", "learning_rate": 1e-3}, "text": {"mode": "lora", "rank": 4}}
    align = {"name": "align", "parts": {"image.connector": "full"}, "data": ["rows/rows.jsonl"], "max_steps": 2}
    sft = {"name": "sft", "parts": lora, "data": [{"path": "rows/rows.jsonl", "first": 10}], "max_steps": 24}
    more = {"name": "more", "parts": {"text": "full"}, "data": ["rows/rows.jsonl"], "max_steps": 1}
    plan = {
        "model": save_tiny_parts(root),
        "seed": 3,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "save_total_limit": 1,
        "stages": [align, sft, more],
    }
    (root / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory, run_plan) -> Path:
    """The plan, run through in one go."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run_plan(world / "plan.yaml", out) == NAMES
    return out


def test_stages_equal_the_same_runs_by_hand(world, finished, tmp_path, train_by_hand):
    document = yaml.safe_load((world / "plan.yaml").read_text())
    model = assemble_checkpoint(tmp_path / "assembled", **document["model"])
    for name in NAMES:
        arguments = ["--config", str(world / "plan.yaml"), "--stage", name]
        train_by_hand([*arguments, "--model", str(model), "--output_dir", str(tmp_path / name)])
        model = tmp_path / name / "final"
        assert_same_weights(finished / name / "final", model)


def test_record_says_how_each_stage_went(finished):
    record = json.loads((finished / "plan.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == NAMES
    for stage, steps in zip(record["stages"], (2, 24, 1), strict=True):
        assert stage["status"] == "done"
        assert stage["seconds"] > 0
        assert stage["steps"] == steps
        assert stage["first_loss"] > 0 and stage["last_loss"] > 0
    assert record["stages"][1]["last_loss"] < record["stages"][1]["first_loss"]


def test_finished_stages_are_skipped(world, finished, tmp_path, run_plan, capsys):
    out = shutil.copytree(finished, tmp_path / "out", symlinks=True)
    before = json.loads((out / "plan.json").read_text())["stages"]
    capsys.readouterr()
    assert run_plan(world / "plan.yaml", out) == []
    table = capsys.readouterr().out
    after = json.loads((out / "plan.json").read_text())["stages"]
    assert [stage["status"] for stage in after] == ["skipped"] * 3 and table.count("skipped") == 3
    assert [stage["seconds"] for stage in after] == [stage["seconds"] for stage in before]


def test_plan_killed_in_its_second_stage_goes_on_bit_for_bit(world, finished, tmp_path, run_plan):
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "sft")
    shutil.rmtree(out / "more")
    command = [sys.executable, ROOT / "train" / "run.py", world / "plan.yaml", "--output_dir", out]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
        },  # else DeepSpeed, where it is installed, warns that there is no GPU
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    end = time.monotonic() + 120
    while not list(out.glob("sft/checkpoint-*/complete.json")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0].decode()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    output = process.communicate()[0].decode()
    assert not (out / "sft" / "final").exists(), "killed too late to show anything"
    assert "warning" not in output.lower()

    assert run_plan(world / "plan.yaml", out) == ["sft", "more"]
    record = json.loads((out / "plan.json").read_text())
    assert [stage["status"] for stage in record["stages"]] == ["skipped", "resumed", "done"]
    for name in NAMES:
        assert_same_weights(finished / name / "final", out / name / "final")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("stages.align.max_steps=3", "stage 'align'.*max_steps = 2, now 3"),
        ("stages.sft.parts.text.rank=8", r"stage 'sft'.*parts\.text\.rank = 4, now 8"),
        ("stages.sft.weight_decay=0.1", "stage 'sft'.*weight_decay = None, now 0.1"),
        ("stages.more.data=[{path: rows/rows.jsonl, first: 4}]", r"stage 'more'.*other data: .*rows\.jsonl"),
        ("seed=4", "stage 'align'.*seed = 3, now 4"),
        ("model.image.connector=linear", "assembled from"),
    ],
)
def test_changed_plan_is_refused_and_nothing_touched(world, finished, run_plan, change, named):
    before = snapshot(finished)
    with pytest.raises(CheckpointError, match=f"(?s){named}"):
        run_plan(world / "plan.yaml", finished, change)
    assert snapshot(finished) == before


def test_what_does_not_decide_the_outcome_may_change(world, finished, run_plan):
    before = snapshot(finished)
    run_plan(world / "plan.yaml", finished, "save_steps=1", "stages.align.logging_steps=7", dry_run=True)
    assert snapshot(finished) == before


def test_changed_row_file_is_refused(world, finished, tmp_path, run_plan):
    shutil.copytree(world / "rows", tmp_path / "rows")
    run_plan(world / "plan.yaml", finished, data_root=tmp_path, dry_run=True)  # the same content elsewhere
    rows = tmp_path / "rows" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("What is", "Which is", 1))
    with pytest.raises(CheckpointError, match="(?s)stage 'align'.*other data"):
        run_plan(world / "plan.yaml", finished, data_root=tmp_path)


def test_stage_is_refused_after_the_one_before_was_trained_anew(world, finished, tmp_path, run_plan):
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "align")
    with pytest.raises(CheckpointError, match="(?s)stage 'sft'.*trained or assembled anew"):
        run_plan(world / "plan.yaml", out, "stages.align.max_steps=1")
    shutil.rmtree(out / "sft")
    shutil.rmtree(out / "more")
    assert run_plan(world / "plan.yaml", out, "stages.align.max_steps=1") == ["sft", "more"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("stages.sft.lerning_rate=1", "unknown option 'lerning_rate' in .*stage 'sft'"),
        ("modle=1", "unknown option 'modle'"),
        ("model.image_encodr=x", r"unknown key 'image_encodr' in .*plan\.yaml"),
        ("model.image.connector=perceptron", "connector = 'perceptron'"),
        ("model.image.connector={type: mlp, layers: 0}", "layers = 0"),
        ("model.image.encoder=/not/there", "image.encoder = '/not/there' is not there"),
        ("model=not/there", "holds no checkpoint"),
        ("stages.sft.name=align", "'align', which is taken"),
        ("stages.sft.name=../sft", "has the name '../sft'"),
        ("stages.sft.name=assembled", "'assembled', which is taken"),
        ("stages.more.data=[absent.jsonl]", r"absent\.jsonl is not there"),
        ("stages.more.data=[]", "no `data`"),
        ("stages.more.parts={image.decoder: full}", "'image.decoder'"),
        ("stages.more.parts.text=half", "mode = 'half'"),
        ("stages.more.max_steps=few", "max_steps"),
        ("stages.more.output_dir=elsewhere", "`output_dir` in .*stage 'more'"),
        ("stages=[]", "is no plan"),
        ("stages.rdpo.seed=1", "no 'rdpo.seed' under stages"),
        ("stages.sft=1", "no 'sft' under stages"),
        ("seed.x=1", "no 'x' under seed"),
        ("seed", "expected: key.path=value"),
        ("seed={", "expected: a value in YAML"),
    ],
)
def test_bad_plan_is_refused_before_anything_is_made(world, tmp_path, run_plan, change, named):
    with pytest.raises(OptionError, match=f"(?s){named}"):
        run_plan(world / "plan.yaml", tmp_path / "out", change)
    assert not (tmp_path / "out").exists()


def test_directory_of_something_else_is_refused(world, tmp_path, run_plan):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds files, but no plan\.json"):
        run_plan(world / "plan.yaml", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_changes_find_stages_by_name_and_parts_by_their_dotted_names():
    plan = {
        "model": {"image": {}},
        "stages": [{"name": "a"}, {"name": "b", "parts": {"image.connector": {"mode": "full"}}}],
    }
    apply_change(plan, "seed=1")
    apply_change(plan, "model.image.encoder=dir/encoder")
    apply_change(plan, "stages.a.data=[x.jsonl, {path: y.jsonl, first: 2}]")
    apply_change(plan, "stages.b.parts.image.connector.learning_rate=1.0e-3")
    apply_change(plan, "stages.b.parts.image.encoder=lora")
    assert plan == {
        "model": {"image": {"encoder": "dir/encoder"}},
        "seed": 1,
        "stages": [
            {"name": "a", "data": ["x.jsonl", {"path": "y.jsonl", "first": 2}]},
            {
                "name": "b",
                "parts": {"image.connector": {"mode": "full", "learning_rate": 0.001}, "image.encoder": "lora"},
            },
        ],
    }


def test_failed_stage_is_named(world, tmp_path, run_program):
    stage = read_plan(world / "plan.yaml", output_dir=tmp_path).stages[1]
    with pytest.raises(MllmError, match="stage 'sft' ended with status 3"):
        run_program.launch([sys.executable, "-c", "raise SystemExit(3)"], stage)


@pytest.fixture
def interruptible():
    """Python's own handler: a shell that starts us in the background has us ignore interruptions."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interruption_ends_the_processes_of_the_stage(world, tmp_path, run_program, interruptible):
    stage = read_plan(world / "plan.yaml", output_dir=tmp_path).stages[1]
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"

    def interrupt():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_program.launch([sys.executable, "-c", launcher], stage)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def assert_same_weights(directory: Path, other: Path) -> None:
    names = [path.name for path in sorted(directory.glob("*.safetensors"))]
    assert names and names == [path.name for path in sorted(other.glob("*.safetensors"))]
    for name in names:
        left, right = load_file(directory / name), load_file(other / name)
        assert left.keys() == right.keys()
        assert all(left[key].equal(right[key]) for key in left), f"{directory / name} differs from {other / name}"


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    paths = [directory, *directory.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}
