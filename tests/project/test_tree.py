"""The tree is the table of contents."""

import os
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRAWERS = {"common", "helper", "helpers", "misc", "miscellaneous", "tools", "util", "utilities", "utils"}


def test_no_file_is_a_drawer():
    drawers = [path for path in _our_files() if path.stem.lower().strip("_") in DRAWERS]
    assert not drawers, "name the file after what it holds"


def test_every_package_is_importable_by_name():
    folders = {path.parent for path in (ROOT / "mllm").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_readme_shows_every_package():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    packages = sorted(path.parent.name for path in (ROOT / "mllm").glob("*/__init__.py"))
    assert [name for name in packages if f"{name}/" not in readme] == []


def test_every_law_is_listed():
    listed = re.findall(r"`(test_\w+\.py)`", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in (ROOT / "tests" / "laws").glob("test_*.py"))


def test_lowest_constraints_are_the_floors():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = " ".join(project["dependencies"])
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin.split("==")[0] for pin in pins] == ["transformers", "peft", "accelerate"]
    for pin in pins:
        assert pin.removesuffix(".0").replace("==", ">=") in ranges


def test_core_dependencies_stay_few():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(project["dependencies"]) <= 9


def _our_files() -> list[Path]:
    files = []
    for folder, names, leaves in os.walk(ROOT):
        names[:] = [n for n in names if n not in {"runs", "__pycache__"} and (n == ".ci" or not n.startswith("."))]
        files += [Path(folder, leaf) for leaf in leaves] + [Path(folder, name) for name in names]
    return files
