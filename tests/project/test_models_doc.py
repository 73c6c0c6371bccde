"""docs/models.md says what the code does: its tables are the script's, its options exist, its examples parse."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
import yaml

from mllm.assemble.options import TOWERS, tower_options
from mllm.assemble.tiles import tile_rule
from mllm.models.connectors import CONNECTORS, connector_options
from mllm.sizes.sampling import parse_sampling

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
OPTIONS = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", DOC.split("<!-- connectors: end -->")[1], re.MULTILINE)


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "list_connectors.py"))


@pytest.mark.parametrize("name", ["connectors", "tiles"])
def test_tables_are_those_of_the_script(script, name):
    table = script["connector_table" if name == "connectors" else "tile_table"]()
    assert f"<!-- {name}: made by scripts/list_connectors.py -->\n{table}<!-- {name}: end -->" in DOC, (
        "run scripts/list_connectors.py --write"
    )


def test_every_connector_is_described_and_has_an_example(script):
    described = [name for name, _ in OPTIONS if name in CONNECTORS]
    assert described == sorted(described, key=list(described).index) and set(described) == set(CONNECTORS)
    assert {connector_options(choice)[0] for _, choice, _ in script["CASES"]} == set(CONNECTORS.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in CONNECTORS if f"`{name}`" not in readme] == []


@pytest.mark.parametrize(("name", "written"), [one for one in OPTIONS if one[0] in CONNECTORS])
def test_defaults_are_those_of_the_options(name, written):
    fields = {field.name: field.default for field in dataclasses.fields(CONNECTORS[name].Options)}
    for option in re.findall(r"`([^`]+)`", written):
        key, colon, value = option.partition(": ")
        if key in CONNECTORS:
            continue
        assert key in fields, f"{name} has no option {key}"
        assert not colon or yaml.safe_load(value) == fields[key]


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL))
def test_examples_parse(block):
    example = yaml.safe_load(block)
    check_towers(example.get("model", example))


@pytest.mark.parametrize("line", re.findall(r"`((?:audio: )?\{[^`]*\})`", DOC))
def test_short_examples_parse(line):
    """A connector, a tower, or tiles, as they stand in a sentence."""
    example = yaml.safe_load(line)
    if "audio" in example:
        check_towers(example)
    elif example.get("type") in CONNECTORS:
        connector_options(example)
    else:
        assert "model" in example or tile_rule(example)


def check_towers(model: dict) -> None:
    for kind in TOWERS:
        if kind in model:
            tower = tower_options(kind, model[kind])
            connector_options(tower.connector or "mlp")
            tile_rule(getattr(tower, "tiles", None))
            if kind == "video":
                parse_sampling(tower.frames)
