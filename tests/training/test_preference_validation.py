"""Validation on preferences: the loss and the figures of pairs, answers to their questions, and no trace."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mllm.errors import RowError
from mllm.testing_pairs import save_tiny_pairs

PARTS = {"image.connector": "full", "text": {"mode": "lora", "rank": 4, "dropout": 0.2}}
NUM_ROWS = {"first": 5, "second": 2}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("validation")
    return [str(save_tiny_pairs(root / name, count, side=24)) for name, count in NUM_ROWS.items()]


@pytest.fixture(scope="module")
def options(sources) -> dict:
    return {
        "preset": "rdpo", "parts": PARTS, "eval_data": sources, "eval_strategy": "steps", "eval_steps": 2,
        "per_device_eval_batch_size": 3, "per_device_train_batch_size": 8, "max_steps": 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def validated(prefer, options, tmp_path_factory) -> Path:
    return prefer(tmp_path_factory.mktemp("validated") / "run", **options)


def test_loss_and_figures_are_means_over_pairs(validated, prefer, options, sources, tmp_path):
    """As training has them: a step of rate 0 on the same pairs, from the same weights, logs the same."""
    found = _validations(validated)[-1]
    assert found["step"] == 4 and found["eval/pairs"] == sum(NUM_ROWS.values())
    for name, path in zip(NUM_ROWS, sources, strict=True):
        run = prefer(
            tmp_path / name, data=[path], parts=PARTS, preset="rdpo", model=str(validated / "final"),
            reference=json.loads((validated / "run.json").read_text())["model"]["path"], learning_rate=0.0,
            max_steps=1, per_device_train_batch_size=8,
        )  # fmt: skip
        trained = json.loads((run / "log.jsonl").read_text().splitlines()[0])
        assert found[f"eval/loss/{name}/pairs"] == pytest.approx(trained["loss"], abs=1e-5)
        for figure in ("rewards/chosen", "rewards/contrast", "margins/text", "accuracies/visual", "kl"):
            found[figure] = found.get(figure, 0.0) + NUM_ROWS[name] / 7 * trained[figure]
    for figure in ("rewards/chosen", "rewards/contrast", "margins/text", "accuracies/visual", "kl"):
        assert found[f"eval/{figure}"] == pytest.approx(found[figure], abs=1e-5)
    assert abs(found["eval/margins/text"]) > 1e-4


def test_batches_of_another_size_give_the_same(validated, prefer, options, tmp_path):
    other = prefer(tmp_path / "run", **options | {"per_device_eval_batch_size": 2})
    assert len(_validations(other)) == 2
    for one, two in zip(_validations(validated), _validations(other), strict=True):
        assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("parts", [PARTS, {"text": "full"}], ids=["lora", "full"])
def test_training_is_as_without_validation(prefer, options, tmp_path, parts):
    """Bit for bit, with answers to questions of validation in between."""
    options = options | {"parts": parts, "disable_dropout": False}
    plain = {name: value for name, value in options.items() if not name.startswith(("eval", "per_device_eval"))}
    without = prefer(tmp_path / "without", **plain)
    with_it = prefer(tmp_path / "with", **options, eval_sample_steps=1, eval_on_start=True)
    assert len(_validations(with_it)) == 3
    (name,) = (path.name for path in (without / "final").glob("*.safetensors"))
    before, after = (load_file(run / "final" / name) for run in (without, with_it))
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_questions_of_validation_are_answered_beside_the_chosen_answer(prefer, options, tmp_path):
    run = prefer(tmp_path / "run", **options | {"eval_strategy": "no"}, eval_sample_steps=2)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    samples = [line["sample"] for line in lines if "sample" in line]
    assert [sample["id"] for sample in samples] == ["0", "1"]
    assert samples[0]["question"] == "<image> What is in picture 0?"
    assert samples[0]["reference"] == "There is a red 3."
    assert all(isinstance(sample["answer"], str) for sample in samples)


def test_conversations_are_no_rows_to_validate_preferences_on(prefer, options, rows, tmp_path):
    with pytest.raises(RowError, match="no preference"):
        prefer(tmp_path / "run", **options | {"eval_data": [str(rows)]})


def test_a_damaged_picture_of_validation_is_left_out_or_raised(prefer, options, tmp_path):
    folder = save_tiny_pairs(tmp_path / "rows", 6).parent
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    picture = damaged / "3-retrieved.png"
    picture.write_bytes(picture.read_bytes()[:-30])
    with pytest.raises(ValueError, match="3-retrieved.png"):
        prefer(tmp_path / "error", **options | {"eval_data": [str(damaged / "pairs.jsonl")]})
    source = {"path": str(damaged / "pairs.jsonl"), "on_bad": "quarantine", "max_bad_rate": 0.5}
    run = prefer(tmp_path / "run", **options | {"eval_data": [source]})
    assert _validations(run)[-1]["eval/pairs"] == 5


def _validations(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/loss" in line]
