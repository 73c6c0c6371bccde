"""docs/pruning.md names what there is: every method, its options and their defaults, and what is not supported."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from mllm.pruning import PRUNERS, Pruner
from mllm.pruning.anatomy import UNSUPPORTED

DOC = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text(encoding="utf-8")
SHARED = {field.name for field in dataclasses.fields(Pruner)}
ROWS = {row[0]: row for row in re.findall(r"^\| `(\w+)` \|(.*)\|([^|]*)\|$", DOC.split("## Models")[0], re.MULTILINE)}


def test_the_table_has_every_method_and_no_other():
    assert set(ROWS) == set(PRUNERS)


@pytest.mark.parametrize("name", PRUNERS)
def test_the_table_has_every_option_with_its_default(name):
    plain = PRUNERS[name]()
    own = {
        field.name: getattr(plain, field.name)
        for field in dataclasses.fields(plain)
        if field.init and field.name not in SHARED
    }
    told = dict(re.findall(r"`(\w+): ([^`]*)`", ROWS[name][2]))
    assert told == {option: _written(value) for option, value in own.items()}


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_models_that_cannot_be_pruned_are_named(model_type):
    plain = re.sub(r"[^a-z0-9]", "", DOC.lower())
    assert re.sub(r"[^a-z0-9]", "", model_type) in plain


def _written(value) -> str:
    """As YAML, and so as `build_pruner`, has it."""
    return yaml.safe_dump(value).splitlines()[0]
