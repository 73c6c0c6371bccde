"""Preferences on two ranks == one process, plainly, under ZeRO-2 and under ZeRO-3; and no reference moves.

Both ranks really run, over gloo. One of them lacks images where the other has some, or has no pair at all. The
reference is the model without its adapters and with the untrained copies of what is trained beside them, or a model of
its own, which ZeRO-3 shards, too; or it was asked before the run. Each step asks it through the wrapped model: a
collective that one rank does not join would stop them, or hang until the time is up.
"""

import functools
import json
import math
import os
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mllm import load_model
from mllm.data.batch_plan import rank_batches
from mllm.data.order import every_row_once
from mllm.load import merged
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_pairs import save_tiny_pairs
from mllm.training import reference_pass
from mllm.training.preference import MultimodalDPOTrainer

BESIDE = {"parts": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}}
ALL_PARTS = {"parts": {"image.encoder": "full", "image.connector": "full", "text": "full"}}
RUNS = {
    "rdpo, a rank without a pair": BESIDE | {"preset": "rdpo"},
    "rdpo, precomputed": BESIDE | {"preset": "rdpo", "precompute_ref_log_probs": True},
    "dpo, a rank without images": BESIDE | {"preset": "dpo"},
    "dpo, precomputed": BESIDE | {"preset": "dpo", "precompute_ref_log_probs": True},
    "dpo, accumulated": BESIDE | {"preset": "dpo", "gradient_accumulation_steps": 2},
    "dpo, text alone is trained": {"preset": "dpo", "parts": {"text": {"mode": "lora", "rank": 4}}},
    "dpo, a reference of its own": ALL_PARTS | {"preset": "dpo", "encoder_chunk": 1},
    "rdpo, all parts, precomputed": ALL_PARTS | {"preset": "rdpo", "precompute_ref_log_probs": True},
    "stock": BESIDE | {"preset": "dpo"},
    "stock, a reference of its own": ALL_PARTS | {"preset": "dpo"},
}
FEW = {
    "rdpo, a rank without a pair",
    "rdpo, precomputed",
    "dpo, a rank without images",
    "dpo, a reference of its own",
}
"""Runs of the fast tier."""
OPTIONS = {"optim": "sgd", "learning_rate": 0.3, "beta": 0.5, "max_steps": 5, "per_device_eval_batch_size": 2}
LIVE = {"rdpo, precomputed": "rdpo, a rank without a pair", "dpo, precomputed": "dpo, a rank without images"}
"""Runs that differ in nothing but when the reference is asked."""


@pytest.fixture(scope="module")
def runs(assembled, tmp_path_factory) -> dict[str, dict]:
    """The options of each run, with its model and its rows.

    In micro-batches of 2 there are two whole steps, then one pair for one rank and none for the other. Under `dpo` the
    pairs that the second rank gets in the first epoch have no image.
    """
    root = tmp_path_factory.mktemp("pairs")
    second = {
        row for batch in rank_batches(every_row_once(9)(0, 42), batch_size=2, rank=1, world_size=2) for row in batch
    }
    rows = {
        "rdpo": save_tiny_pairs(root / "all", 9),
        "dpo": save_tiny_pairs(root / "some", 9, has_image=tuple(set(range(9)) - second)),
    }
    stock = save_stock_checkpoint(root / "llava", "llava")
    models = {name: stock if name.startswith("stock") else assembled for name in RUNS}
    return {
        name: OPTIONS | own | {"data": [str(rows[own["preset"]])], "model": str(models[name])}
        for name, own in RUNS.items()
    }


@pytest.fixture(scope="module")
def alone(prefer, runs, tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a run in one process, which is done when it is first asked for."""
    root = tmp_path_factory.mktemp("alone")

    @functools.cache
    def run(name: str) -> Path:
        return prefer(root / name, **runs[name], per_device_train_batch_size=4)

    return run


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("plain", FEW),
        pytest.param("plain", set(RUNS) - FEW, marks=pytest.mark.slow),
        pytest.param("zero2", set(RUNS), marks=pytest.mark.slow),
        pytest.param("zero3", set(RUNS), marks=pytest.mark.slow),
    ],
    ids=["plain", "plain-others", "zero2", "zero3"],
)
def test_two_ranks_equal_one_process(prefer, runs, alone, two_ranks, tmp_path, stage, names):
    chosen = {name: options for name, options in runs.items() if name in names}
    models = {options["model"]: load_model(options["model"]).state_dict() for options in chosen.values()}
    two_ranks(_train_all, prefer, chosen, models, tmp_path, stage)
    _check_shares(tmp_path, [name for name in chosen if "precompute_ref_log_probs" in RUNS[name]])
    for name, options in chosen.items():
        assert _losses(tmp_path / name) == pytest.approx(_losses(alone(name)), abs=1e-4), name
        before = models[options["model"]]
        weights, found = (merged(load_model(run / "final")).state_dict() for run in (alone(name), tmp_path / name))
        for key in weights:
            torch.testing.assert_close(found[key], weights[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
        moved = max(float((weights[key] - before[key]).abs().max()) for key in weights)
        assert moved > 1e-3, f"{name}: hardly trained, so hardly compared"


@pytest.mark.parametrize("known", ["rdpo, precomputed", pytest.param("dpo, precomputed", marks=pytest.mark.slow)])
def test_precomputed_equals_live(alone, known):
    """In one process; on two ranks each of them equals that."""
    assert _losses(alone(known)) == pytest.approx(_losses(alone(LIVE[known])), abs=1e-5)


@pytest.mark.slow
def test_what_was_said_beforehand_is_not_rounded(prefer, runs, two_ranks, tmp_path):
    """In bfloat16 the log-probabilities of an answer have three digits; DeepSpeed would cast whatever it is given."""
    options = runs["rdpo, precomputed"] | {"bf16": True, "max_steps": 1}
    two_ranks(_train_in_half, prefer, options, tmp_path)
    assert _losses(tmp_path / "run")[0] == pytest.approx(2 * math.log(2), abs=1e-4)


def _train_in_half(prefer, options: dict, root: Path) -> None:
    """In each rank."""
    runpy.run_path(str(Path(__file__).parent / "test_sharded.py"))["_be_launched"]("zero2")
    prefer(root / "run", **options)


def _train_all(prefer, runs: dict, models: dict, root: Path, stage: str) -> None:
    """In each rank: all runs, and what became of their references."""
    if stage != "plain":
        runpy.run_path(str(Path(__file__).parent / "test_sharded.py"))["_be_launched"](stage)
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        # Weights as small as these would be kept whole, and nothing be fetched or let go.
        DeepSpeedZeRoOffload.mark_persistent_parameters = lambda *args: []
    trainers: list[MultimodalDPOTrainer] = []
    train_from = MultimodalDPOTrainer.train_from

    def noted(trainer: MultimodalDPOTrainer, *args) -> None:
        trainers.append(trainer)
        train_from(trainer, *args)

    asked: list[int] = []
    answer = reference_pass._answer

    def counted(reference, collated, *args):
        asked.extend(collated.positions)
        return answer(reference, collated, *args)

    MultimodalDPOTrainer.train_from = noted
    reference_pass._answer, reference_pass.PAIRS_OF_A_PIECE = counted, 4
    for name, options in runs.items():
        prefer(root / name, **options)
        (root / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(asked))
        asked.clear()
        _check_reference(trainers.pop(), models[options["model"]], name)


def _check_shares(root: Path, names: list[str]) -> None:
    """Of the pairs that were asked about before a run, each rank has asked about some, and none twice."""
    for name in names:
        shares = [json.loads((root / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        assert sorted(shares[0] + shares[1]) == list(range(9)) and all(shares), name


def _check_reference(trainer: MultimodalDPOTrainer, before: dict[str, torch.Tensor], name: str) -> None:
    """Every weight of the reference is bit for bit what it was, on every rank."""
    own = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if trainer.known is not None:
        assert trainer.reference_model is None, f"{name}: a reference that nobody asks"
        if not hasattr(own, "peft_config"):
            return
    reference = own if trainer.reference_model is None else trainer.accelerator.unwrap_model(trainer.reference_model)
    compared = 0
    for full_name, parameter in reference.named_parameters():
        if "lora_" in full_name or ".modules_to_save." in full_name:
            continue
        key = full_name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        assert torch.equal(_whole(parameter), before[key]), f"{name}: {key} of the reference has moved"
        compared += 1
    assert compared


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
