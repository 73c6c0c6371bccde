"""RLAIF-V: pairs of answers, judged by open models.

python data_recipes/rlaif_v.py --annotations RLAIF-V-Dataset --out ROWS
"""

import json
import sys

from tqdm import tqdm

from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.errors import user_errors

RECIPE = Recipe(
    name="rlaif_v",
    about="RLAIF-V-Dataset: answers of several models, paired by the feedback of open models.",
    source="https://huggingface.co/datasets/openbmb/RLAIF-V-Dataset",
    revision="main (83 K pairs; before May 2024 it had 44,757)",
    licence="CC BY-NC 4.0",
    parts={
        "train": Part(
            files="RLAIF-V-Dataset_*.parquet",
            about="Images lie in the files; they are written into OUT/embedded, each once.",
            rows="83,132",
        )
    },
    importer="rlaif_v",
    fetch="""
        hf download openbmb/RLAIF-V-Dataset --repo-type dataset --local-dir RLAIF-V-Dataset
        then --annotations RLAIF-V-Dataset, the directory of its parquet files
    """,
    dropped={"both answers are the same": "nothing to prefer"},
)


def main() -> None:
    with user_errors():
        print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


if __name__ == "__main__":
    main()
