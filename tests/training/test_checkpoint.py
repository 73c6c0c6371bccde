"""What a run leaves on disk, also when it is killed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mllm import load_model, load_processor
from mllm.checkpoints import is_complete
from mllm.errors import CheckpointError
from mllm.training import trainer as trainer_module
from mllm.training.checkpoint import latest_checkpoint, remove_old, require_weights

PARTS = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}
SAVING = {"parts": PARTS, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("straight") / "run", **SAVING)


def test_every_checkpoint_is_whole_and_loads(straight):
    names = sorted(path.name for path in straight.iterdir())
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "final", "log.jsonl", "run.json"]
    for name in ("checkpoint-2", "final"):
        assert is_complete(straight / name)
        assert load_processor(straight / name).chat_template
        assert load_model(straight / name).peft_config["default"].base_model_name_or_path
        assert json.loads((straight / name / "run.json").read_text())["options"]["parts"]["text"]["rank"] == 4


def test_nothing_is_pickled_but_the_state_of_the_run(straight):
    suffixes = {".safetensors", ".json", ".jinja"}
    assert {path.suffix for path in (straight / "final").iterdir()} == suffixes
    others = {path.name for path in (straight / "checkpoint-2").iterdir() if path.suffix not in suffixes}
    assert others == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_killed_in_the_middle_of_the_weights_goes_on_from_the_checkpoint_before(
    train, straight, tmp_path, monkeypatch
):
    """The other moments of a save: tests/laws/test_killed_while_saving.py."""

    def write_half(directory: Path, *args, **kwargs) -> None:
        if directory.name != "checkpoint-4":
            return real(directory, *args, **kwargs)
        (directory / "adapter_model.safetensors").write_bytes(b"half of i")
        os.kill(os.getpid(), signal.SIGKILL)

    real = trainer_module.write_weights
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "write_weights", write_half)
        assert _run_in_a_fork(train, out) == -signal.SIGKILL
    assert (out / "checkpoint-4.partial").is_dir()
    assert latest_checkpoint(out) == out / "checkpoint-2"
    load_model(out / "checkpoint-2")

    train(out, **SAVING)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in straight.iterdir())
    one, other = (load_file(run / "final" / "adapter_model.safetensors") for run in (straight, out))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_old_checkpoints_go_when_newer_ones_are_there(train, tmp_path):
    out = train(tmp_path / "run", **SAVING | {"save_total_limit": 1})
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_checkpoint_without_weights_is_not_complete(straight, tmp_path):
    require_weights(straight / "checkpoint-2")
    shutil.copytree(straight / "checkpoint-2", tmp_path / "pieces", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(CheckpointError, match="pieces was written without weights"):
        require_weights(tmp_path / "pieces")


def test_the_newest_complete_checkpoint_counts(straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-10")
    assert latest_checkpoint(run) == run / "checkpoint-10"
    (run / "checkpoint-10" / "complete.json").unlink()
    assert latest_checkpoint(run) == run / "checkpoint-6"
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (run / "checkpoint-12.partial").mkdir()
    remove_old(run, keep=2)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-6"]


def _run_in_a_fork(train, out: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            train(out, **SAVING)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
