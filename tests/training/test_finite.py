"""A loss that is no number stops the run, on all ranks, before the step is taken, and leaves what was saved."""

import json
import os
from pathlib import Path

import pytest

from mllm import load_model
from mllm.errors import TrainingError
from mllm.models import modeling
from mllm.models.loss import supervised_loss
from mllm.training.checkpoint import latest_checkpoint

OPTIONS = {
    "parts": {"text": "full"}, "save_strategy": "steps", "save_steps": 1, "max_steps": 4, "logging_steps": 1,
    "learning_rate": 1e-3,
}  # fmt: skip
BROKEN_STEP = 3


@pytest.fixture
def break_the_loss(monkeypatch):
    """Make the loss of one call no number."""

    def start(value: float, *, calls: int) -> None:
        made = []

        def broken(*args, **kwargs):
            loss, token_losses = supervised_loss(*args, **kwargs)
            made.append(loss)
            return (loss * value if len(made) == calls else loss), token_losses

        monkeypatch.setattr(modeling, "supervised_loss", broken)

    return start


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_it_stops_before_the_step_and_names_the_rows(train, tmp_path, break_the_loss, value):
    break_the_loss(value, calls=BROKEN_STEP)
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, **OPTIONS)
    found = caught.value.found
    assert f"step {BROKEN_STEP}" in found and f"loss {value}" in found and "row 'row-" in found
    assert "learning rate of 0.0005" in found and "rows.jsonl" in found
    assert "checkpoint-2 is whole" in caught.value.do
    _assert_only_the_whole_is_left(tmp_path)


def test_gradients_of_a_whole_loss_are_looked_at_too(train, tmp_path, monkeypatch):
    made = []

    def broken(*args, **kwargs):
        loss, token_losses = supervised_loss(*args, **kwargs)
        made.append(loss)
        if len(made) == BROKEN_STEP:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss, token_losses

    monkeypatch.setattr(modeling, "supervised_loss", broken)
    with pytest.raises(TrainingError, match=f"step {BROKEN_STEP}.*gradients of norm nan after row 'row-"):
        train(tmp_path, **OPTIONS)
    _assert_only_the_whole_is_left(tmp_path)


def test_it_is_seen_in_any_micro_batch(train, tmp_path, break_the_loss):
    """In the first of two, after which the second is whole again; only the rows of the first are named."""
    break_the_loss(float("nan"), calls=2 * BROKEN_STEP - 1)
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, **OPTIONS, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    assert caught.value.found.count("row 'row-") == 1
    _assert_only_the_whole_is_left(tmp_path)


def test_all_ranks_stop_together(train, tmp_path, two_ranks, break_the_loss):
    two_ranks(_stops, train, tmp_path, break_the_loss)
    _assert_only_the_whole_is_left(tmp_path)


def test_a_run_can_go_on_afterwards(train, tmp_path, monkeypatch, break_the_loss):
    break_the_loss(float("nan"), calls=BROKEN_STEP)
    with pytest.raises(TrainingError):
        train(tmp_path, **OPTIONS)
    monkeypatch.undo()
    train(tmp_path, **OPTIONS)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open() if '"loss"' in line]
    assert steps == [1, 2, 3, 4]


def _stops(train, run: Path, break_the_loss) -> None:
    """In each rank: the loss of the second is broken, and both say so."""
    if os.environ["RANK"] == "1":
        break_the_loss(float("nan"), calls=BROKEN_STEP)
    with pytest.raises(TrainingError, match="row 'row-"):
        train(run, **OPTIONS)


def _assert_only_the_whole_is_left(run: Path) -> None:
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (run / "final").exists()
    weights = load_model(latest_checkpoint(run)).state_dict()
    assert all(tensor.isfinite().all() for tensor in weights.values())
