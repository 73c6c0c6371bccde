"""What every test stands on: one thread, no network, no GPU unless asked for, the same seed.

Nothing here may import mllm: the shape-checking import hook must come first.
"""

import os

# Before torch is imported, here or in a child process. One thread makes sums repeatable and leaves the other cores to
# the other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import ipaddress
import multiprocessing
import random
import runpy
import shutil
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy
import pytest
import torch
import transformers

# transformers makes a dataclass of every configuration and lets its __init__ take unknown keywords, which the wrapper
# that jaxtyping puts around a dataclass's __init__ refuses. transformers validates those fields itself; methods stay
# checked.
transformers.PreTrainedConfig.__no_type_check__ = True
# An output may be made of a dict of its fields, too; accelerate does so under mixed precision.
transformers.utils.ModelOutput.__no_type_check__ = True


def pytest_configure(config: pytest.Config) -> None:
    tiers = config.option.markexpr
    if "not gpu" in tiers:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "not network" in tiers:
        os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _own_index_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indexes of data are kept where the run leaves no trace; child processes inherit it."""
    os.environ["MLLM_CACHE"] = str(tmp_path_factory.mktemp("index_cache"))


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine can be reached, unless the test is marked `network`."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def connect_to_this_machine(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_this_machine(address[0]):
            raise OSError(f"a test tried to reach {address[0]}; mark it `network`, or give it a local double")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_to_this_machine)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium or Chrome, for tests marked `browser`."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    message = "no Chromium on this machine (on Debian: apt-get install chromium)"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def assembled(tmp_path_factory) -> Path:
    """A composed model, saved."""
    from mllm.assemble import assemble_checkpoint
    from mllm.testing import save_tiny_parts

    root = tmp_path_factory.mktemp("assembled")
    return assemble_checkpoint(root / "model", **save_tiny_parts(root))


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """Twelve rows, four of them without an image."""
    from mllm.testing import save_tiny_rows

    return save_tiny_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="session")
def lopsided_rows(tmp_path_factory) -> Path:
    """Nine rows. Those that the second of two ranks gets are text alone in the first epoch, and some in the second.

    In micro-batches of 2 and with seed 42 there are two whole steps, then one row for one rank and none for the other.
    """
    from mllm.data.batch_plan import rank_batches
    from mllm.data.order import every_row_once
    from mllm.testing import save_tiny_rows

    second = list(rank_batches(every_row_once(9)(0, 42), batch_size=2, rank=1, world_size=2))
    assert second[-1] == []
    text_only = {row for batch in second for row in batch}
    directory = tmp_path_factory.mktemp("lopsided")
    return save_tiny_rows(directory, 9, num_images=lambda number: 0 if number in text_only else 1 + number % 2)


@pytest.fixture(scope="session")
def train(assembled: Path, rows: Path):
    """Run `train/sft.py` in this process, on the tiny model and rows unless told otherwise; returns OUTPUT_DIR."""
    from mllm.training.arguments import build_arguments

    run = runpy.run_path(str(Path(__file__).parents[1] / "train" / "sft.py"))["run"]

    def start(output_dir: Path, **options) -> Path:
        settled = {
            "model": str(assembled),
            "data": [str(rows)],
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        run(build_arguments(settled | options, where="the test"))
        return output_dir

    return start


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Eight preference rows, each with an image and a retrieved one."""
    from mllm.testing_pairs import save_tiny_pairs

    return save_tiny_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def prefer(assembled: Path, pairs: Path):
    """Run `train/rdpo.py` in this process, on the tiny model and pairs unless told otherwise; returns OUTPUT_DIR.

    The picture of the run, which takes longer than the run, is drawn where it `is_drawn`.
    """
    from mllm.training.arguments import build_arguments
    from mllm.training.preference_options import PreferenceArguments

    run = runpy.run_path(str(Path(__file__).parents[1] / "train" / "rdpo.py"))["run"]
    draw = run.__globals__["draw_preference"]

    def start(output_dir: Path, *, is_drawn: bool = False, **options) -> Path:
        settled = {
            "model": str(assembled),
            "data": [str(pairs)],
            "parts": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}},
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        run.__globals__["draw_preference"] = draw if is_drawn else lambda _: True
        run(build_arguments(settled | options, PreferenceArguments, where="the test"))
        return output_dir

    return start


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session")
def two_ranks():
    """Call a function in two processes that train together, over gloo on the CPU; their errors are the test's.

    They are forked, so that nothing is imported again.
    """

    def call(function, *args, timeout: float = 240) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_rank, args=(rank, port, function, args)) for rank in range(2)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        # One that has failed leaves the other waiting: not for long.
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode for process in ranks):
                deadline = min(deadline, time.monotonic() + 10)
            for process in ranks:
                process.join(0.1)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        assert codes == [0, 0]

    return call


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
