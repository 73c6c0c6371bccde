"""A run killed while it saves goes on from the checkpoint before, and ends as one that was not killed."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from mllm.checkpoints import is_complete
from mllm.training import trainer
from mllm.training.checkpoint import latest_checkpoint

OPTIONS = {
    "parts": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}},
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 1,
}
MOMENTS = {
    "before the weights": (trainer, "write_weights", "checkpoint-2"),
    "before it is marked complete": (trainer, "mark_complete", "checkpoint-2"),
    "before it gets its name": (os, "rename", "checkpoint-2"),
    "before the old one is deleted": (trainer, "remove_old", "checkpoint-4"),
}


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("straight") / "run", **OPTIONS)


@pytest.mark.parametrize(("owner", "function", "left"), MOMENTS.values(), ids=MOMENTS.keys())
def test_the_checkpoint_before_is_gone_on_from(train, straight, tmp_path, owner, function, left):
    run = tmp_path / "run"
    assert _exit_code(_train_and_die, train, run, owner, function) == -signal.SIGKILL
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint.name == left
    assert not (run / "final").exists()

    train(run, **OPTIONS)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in straight.iterdir())
    assert is_complete(run / "final", kind="model")
    weights = "final/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (straight / weights).read_bytes()


def _train_and_die(train, run: Path, owner, function: str) -> None:
    """Kill this process where it would call the function for the second checkpoint."""
    original = getattr(owner, function)

    def call_or_die(*args, **kwargs):
        if "checkpoint-4" in str(args) or (run / "checkpoint-4").is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, function, call_or_die)
    train(run, **OPTIONS)


def _exit_code(function, *args) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
    return process.exitcode
