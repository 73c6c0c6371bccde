"""Two ranks == one process, also where one of them has no media, or no row at all, in its micro-batch.

Both ranks really run, over gloo. Unequal calls of the encoder, or a parameter that waits for a gradient, would hang or
stop them.
"""

import multiprocessing
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch

from mllm import load_model
from mllm.data.order import every_row_once
from mllm.data.sampler import rank_batches
from mllm.load import merged
from mllm.testing import save_tiny_rows

TIMEOUT = 120
NUM_ROWS = (
    9  # in micro-batches of 2 on 2 ranks: two whole steps, then one row for the first rank and none for the other
)
SEED = 42

RUNS = {
    "connector": {"parts": {"image.connector": "full"}},
    "lora and connector": {"parts": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}},
    "encoder beside lora, accumulated": {
        "parts": {"image.encoder": "full", "text": {"mode": "lora", "rank": 4}},
        "gradient_accumulation_steps": 2,
    },
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Rows of which those of the second rank are text alone in the first epoch, and some in the second."""
    second = list(rank_batches(every_row_once(NUM_ROWS)(0, SEED), batch_size=2, rank=1, world_size=2))
    assert second[-1] == []
    text_only = {row for batch in second for row in batch}
    directory = tmp_path_factory.mktemp("rows")
    return save_tiny_rows(directory, NUM_ROWS, num_images=lambda number: 0 if number in text_only else 1 + number % 2)


def test_two_ranks_equal_one_process(train, mixed, tmp_path):
    for name, options in RUNS.items():
        accumulation = options.get("gradient_accumulation_steps", 1)
        train(
            tmp_path / name / "one", data=[str(mixed)], optim="sgd", save_strategy="steps", save_steps=2, max_steps=5,
            **options | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation},
        )  # fmt: skip
    _spawn_two(_train_all, train, mixed, tmp_path)
    for name in RUNS:
        one, two = (merged(load_model(tmp_path / name / run / "final")).state_dict() for run in ("one", "two"))
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")


def _train_all(train, rows: Path, root: Path) -> None:
    """In each rank. The last run is stopped and goes on."""
    options: dict = {"data": [str(rows)], "optim": "sgd", "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    for name, own in RUNS.items():
        train(root / name / "two", **options, **own)
    if os.environ["RANK"] == "0":
        shutil.rmtree(root / name / "two" / "final")
        shutil.rmtree(root / name / "two" / "checkpoint-4")
        shutil.rmtree(root / name / "two" / "checkpoint-5")
    torch.distributed.barrier()
    train(root / name / "two", **options, **own)


def _spawn_two(function, *args) -> None:
    """Run `function` in two forked ranks; their errors are this test's."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, port, function, args)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        if process.is_alive():
            process.kill()
    assert codes == [0, 0]


def _rank(rank: int, port: int, function, args) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    try:
        function(*args)
        torch.distributed.destroy_process_group()
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
