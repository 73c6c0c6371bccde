"""Validation: one number for the rows, however they are batched and over however many ranks; training is as without.

The loss of all rows is the mean over their supervised tokens, so it is that of each row alone, weighted by its tokens.
"""

import json
from pathlib import Path

import pytest
import torch

from mllm import load_model, load_processor
from mllm.data.collate import PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.models.supervised import attach_supervised_forward
from mllm.testing import save_tiny_rows
from mllm.testing_checkpoints import save_stock_checkpoint

PARTS = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}
NUM_ROWS = {"first": 5, "second": 4}
"""On two ranks in batches of 2: two whole ones for each, then a row for the first rank and none for the other."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """Two sources; of the first every second row is text alone."""
    root = tmp_path_factory.mktemp("validation")
    return [
        str(save_tiny_rows(root / name, count, num_images=lambda number: number % 2))
        for name, count in NUM_ROWS.items()
    ]


@pytest.fixture(scope="module", params=["composed", pytest.param("stock", marks=pytest.mark.slow)])
def model(request, assembled, tmp_path_factory) -> Path:
    if request.param == "composed":
        return assembled
    return save_stock_checkpoint(tmp_path_factory.mktemp("stock") / "checkpoint", "llava")


@pytest.fixture(scope="module")
def options(model, sources) -> dict:
    return {
        "model": str(model), "parts": PARTS, "eval_data": sources, "eval_strategy": "steps", "eval_steps": 2,
        "per_device_eval_batch_size": 2, "max_steps": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def one(train, options, tmp_path_factory) -> Path:
    """One process."""
    return train(tmp_path_factory.mktemp("one") / "run", per_device_train_batch_size=4, **options)


def test_it_is_the_mean_over_tokens_of_each_row_alone(one, sources):
    """In float64 sums, by source and over all."""
    totals, counts = {}, {}
    for name, path in zip(NUM_ROWS, sources, strict=True):
        losses = torch.cat(list(_losses_of_rows(one / "final", path)))
        totals[name], counts[name] = losses.double().sum().item(), len(losses)
    found = _logged(one)[-1]
    assert found["eval/supervised_tokens"] == sum(counts.values())
    assert found["eval/loss"] == pytest.approx(sum(totals.values()) / sum(counts.values()), abs=1e-5)
    for name in NUM_ROWS:
        assert found[f"eval/loss/{name}/rows"] == pytest.approx(totals[name] / counts[name], abs=1e-5)


def test_two_ranks_equal_one_process(train, two_ranks, options, one, tmp_path):
    two_ranks(_train_in_rank, train, tmp_path / "two", options)
    found, expected = _logged(tmp_path / "two"), _logged(one)
    assert len(found) == len(expected) == 1
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert found[0][name] == pytest.approx(value, abs=1e-5), name


def test_batches_of_another_size_give_the_same(train, options, one, tmp_path):
    run = train(tmp_path / "run", per_device_train_batch_size=4, **options | {"per_device_eval_batch_size": 5})
    assert _logged(run)[0] == pytest.approx(_logged(one)[0], abs=1e-5)


def test_training_is_as_without_validation(train, options, tmp_path):
    """Bit for bit, with dropout, and with a sample answered at every step."""
    options = options | {"parts": PARTS | {"text": {"mode": "lora", "rank": 4, "dropout": 0.2}}, "eval_steps": 1}
    plain = {name: value for name, value in options.items() if not name.startswith(("eval", "per_device_eval"))}
    without = train(tmp_path / "without", **plain)
    validated = train(tmp_path / "with", **options, eval_sample_steps=1, eval_on_start=True)
    assert len(_logged(validated)) == 3
    expected, weights = (load_model(run / "final").state_dict() for run in (without, validated))
    assert [name for name in expected if not torch.equal(expected[name], weights[name])] == []


def _train_in_rank(train, run: Path, options: dict) -> None:
    train(run, **options)


def _losses_of_rows(checkpoint: Path, path: str):
    model, processor = load_model(checkpoint), load_processor(checkpoint)
    attach_supervised_forward(model)
    collate = PaddingCollator(processor)
    for example in Examples(open_mixture(read_mixture([path])), processor):
        with torch.no_grad():
            yield model(**collate([example]), use_cache=False).token_losses


def _logged(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    return [line for line in lines if "eval/loss" in line]
