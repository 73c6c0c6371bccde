"""Two ranks == one process, also where one of them has no media, or no row at all, in its micro-batch.

Both ranks really run, over gloo. Unequal calls of the encoder, or a parameter that waits for a gradient, would hang or
stop them.
"""

import os
import shutil
from pathlib import Path

import torch

from mllm import load_model
from mllm.load import merged

RUNS = {
    "connector": {"parts": {"image.connector": "full"}},
    "lora and connector": {"parts": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}},
    "fewer visual tokens": {
        "parts": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}},
        "pruner": {"method": "visionzip", "tokens": [1, 4]},
    },
    "encoder beside lora, accumulated": {
        "parts": {"image.encoder": "full", "text": {"mode": "lora", "rank": 4}},
        "gradient_accumulation_steps": 2,
    },
}


def test_two_ranks_equal_one_process(train, lopsided_rows, two_ranks, tmp_path):
    for name, options in RUNS.items():
        train(tmp_path / name / "one", per_device_train_batch_size=4, **_settled(lopsided_rows), **options)
    two_ranks(_train_all, train, lopsided_rows, tmp_path)
    for name in RUNS:
        one, two = (merged(load_model(tmp_path / name / run / "final")).state_dict() for run in ("one", "two"))
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")


def _train_all(train, rows: Path, root: Path) -> None:
    """In each rank. The last run is stopped and goes on."""
    for name, own in RUNS.items():
        train(root / name / "two", **_settled(rows), **own)
    if os.environ["RANK"] == "0":
        shutil.rmtree(root / name / "two" / "final")
        shutil.rmtree(root / name / "two" / "checkpoint-4")
        shutil.rmtree(root / name / "two" / "checkpoint-5")
    torch.distributed.barrier()
    train(root / name / "two", **_settled(rows), **own)


def _settled(rows: Path) -> dict:
    return {"data": [str(rows)], "optim": "sgd", "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
