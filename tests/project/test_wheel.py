"""The wheel is the library; the checkout is the laboratory."""

import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in the wheel."""
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_wheel_holds_mllm_and_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel}
    (metadata,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"mllm", metadata}
    assert metadata.startswith("mllm_toolkit-"), "the name `mllm` on the package index belongs to somebody else"


def test_wheel_holds_every_file_of_mllm(wheel):
    # Modules, py.typed and chat templates: whatever an ignore rule or a forgotten pattern would leave behind.
    in_checkout = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mllm").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert "mllm/py.typed" in in_checkout
    assert in_checkout == {name for name in wheel if name.startswith("mllm/")}


def test_wheel_holds_the_licence(wheel):
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
