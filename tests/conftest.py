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
import random
import shutil
import socket

import numpy
import pytest
import torch
import transformers

# transformers makes a dataclass of every configuration and lets its __init__ take unknown keywords, which the wrapper
# that jaxtyping puts around a dataclass's __init__ refuses. transformers validates those fields itself; methods stay
# checked.
transformers.PreTrainedConfig.__no_type_check__ = True


def pytest_configure(config: pytest.Config) -> None:
    tiers = config.option.markexpr
    if "not gpu" in tiers:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "not network" in tiers:
        os.environ["HF_HUB_OFFLINE"] = "1"


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


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == "localhost"
