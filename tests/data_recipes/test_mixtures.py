"""The mixtures that come with the recipes."""

from pathlib import Path

import pytest

from mllm.data.importers import IMPORTERS
from mllm.data.mixture_file import read_mixture

FOLDER = Path(__file__).parents[2] / "data_recipes" / "mixtures"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_mixture_is_a_list_of_known_sources_with_their_licence(path, tmp_path, recipe_of):
    found = read_mixture({"mixture": str(path), "media_root": str(tmp_path)})
    for source in found.sources:
        assert source.format in IMPORTERS
        assert source.media_root == tmp_path
        recipe, _, part = source.name.partition("/")
        stated = recipe_of(recipe)
        facts = stated.parts[part or next(iter(stated.parts))]
        assert (source.format, source.coordinates) == (stated.importer, facts.coordinates)
        assert source.licence.split()[0] == stated.licence.split()[0]
        if "*" not in facts.files:
            assert str(source.path).endswith(Path(facts.files).name)


def test_they_are_all_there():
    names = "llava15_pretrain llava15_sft rdpo_realign rlaifv_dpo sharegpt4v_pretrain sharegpt4v_sft"
    assert [path.stem for path in FILES] == names.split()
