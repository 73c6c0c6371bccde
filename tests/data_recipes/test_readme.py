"""What the table and --help say of the recipes."""

import re
from pathlib import Path

import pytest

from mllm.data.recipe import recipe_parser

FOLDER = Path(__file__).parents[2] / "data_recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
TABLE = {
    cells[1].strip(" `"): cells
    for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    if len(cells := line.split("|")) == 8 and "`" in cells[1]
}


def test_the_table_lists_every_recipe():
    assert sorted(TABLE) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("digits")])
def test_a_recipe_states_its_facts(name, recipe_of):
    recipe = recipe_of(name)
    text = recipe_parser(recipe).format_help()
    assert recipe.name == name
    for fact in (recipe.source, recipe.revision, recipe.licence, *(part.files for part in recipe.parts.values())):
        assert fact and words(fact) in words(text)
    assert "How to get it" in text and "--annotations" in recipe.fetch
    _, _, source, _, licence, rows, *_ = TABLE[name]
    address = re.search(r"[\w.-]+/[\w./-]+\w", source)[0]
    assert address in recipe.source
    assert words(licence)[:8] == words(recipe.licence)[:8] or "none" in recipe.licence
    stated = {part.rows for part in recipe.parts.values() if re.fullmatch(r"[\d,]+( K)?", part.rows)}
    assert all(count in rows for count in stated) or "nine sets" in rows


def words(text):
    return " ".join(text.split())
