"""Programs run by path, tell a story and define nothing that another file needs."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("train", "serve", "scripts", "data_recipes")
PROGRAMS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))

each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())


@each_program
def test_program_explains_itself(program):
    run = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.lower().startswith("usage:")


@each_program
def test_program_is_a_story(program):
    tree = ast.parse(program.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a program begins by saying what it does"
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not classes, "spawned workers cannot unpickle a program's classes: move them into mllm/"
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


@each_program
def test_program_hides_no_module(program):
    # A program's own folder comes first on sys.path: one called `datasets.py` would be imported in place of datasets.
    assert importlib.util.find_spec(program.stem) is None


@pytest.mark.parametrize("folder", FOLDERS)
def test_programs_are_no_package(folder):
    assert not list((ROOT / folder).rglob("__init__.py"))
