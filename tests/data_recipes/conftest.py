"""Recipes run in this process, as their programs run them."""

import runpy
from pathlib import Path

import pytest

from mllm.data.recipe import run_recipe

FOLDER = Path(__file__).parents[2] / "data_recipes"


@pytest.fixture(scope="session")
def recipe_of():
    """A recipe by its program's name."""
    found = {}

    def load(name):
        if name not in found:
            found[name] = runpy.run_path(str(FOLDER / f"{name}.py"))["RECIPE"]
        return found[name]

    return load


@pytest.fixture
def convert(recipe_of):
    """Run a recipe; up to half of its records may be bad under `quarantine`. Returns what recipe.json holds."""

    def run(name, annotations, out, *options, on_bad="error"):
        argv = ["--annotations", annotations, "--out", out, "--on_bad", on_bad, "--max_bad_rate", "0.5", *options]
        return run_recipe(recipe_of(name), list(map(str, argv)))

    return run
