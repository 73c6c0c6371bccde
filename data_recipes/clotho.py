"""Clotho: sounds of 15 to 30 seconds, with five captions each.

python data_recipes/clotho.py --part development --annotations clotho_captions_development.csv --out ROWS
"""

import json
import sys

from tqdm import tqdm

from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.errors import user_errors

RECIPE = Recipe(
    name="clotho",
    about="Clotho 2.1: sounds of Freesound, 15 to 30 s each, with five captions of 8 to 20 words by people.",
    source="https://zenodo.org/records/4783391 (arXiv 1910.09387)",
    revision="2.1 (repairs about 150 files of 2.0)",
    licence="captions: Tampere University's terms, not for commerce; sounds: each its own Creative Commons licence",
    parts={
        "development": Part("clotho_captions_development.csv", "For training.", rows="5 for each of 3,840 files"),
        "validation": Part("clotho_captions_validation.csv", "For choosing.", rows="5 for each of 1,046 files"),
        "evaluation": Part(
            "clotho_captions_evaluation.csv",
            "For reporting: keep it out of training.",
            rows="5 for each of 1,045 files",
        ),
    },
    importer="clotho",
    fetch="""
        From the Zenodo record: clotho_captions_PART.csv and clotho_audio_PART.7z
        7z x clotho_audio_development.7z
        then --part development --annotations clotho_captions_development.csv --media_root development
    """,
    dropped={"four of five captions": "only with --captions first"},
)


def main() -> None:
    with user_errors():
        print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


if __name__ == "__main__":
    main()
