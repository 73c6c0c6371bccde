"""RLHF-V: answers with hallucinations, and the same answers as people corrected them.

python data_recipes/rlhf_v.py --annotations RLHF-V-Dataset.parquet --out ROWS
"""

import json
import sys

from tqdm import tqdm

from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.errors import user_errors

RECIPE = Recipe(
    name="rlhf_v",
    about="RLHF-V-Dataset: human corrections, segment by segment, of what models said about images.",
    source="https://huggingface.co/datasets/openbmb/RLHF-V-Dataset",
    revision="main (the card of 5b59b49 was read)",
    licence="CC BY-NC 4.0",
    parts={
        "train": Part(
            files="RLHF-V-Dataset.parquet",
            about="Images lie in the file; they are written into OUT/embedded, each once.",
            rows="5,733",
        )
    },
    importer="rlhf_v",
    fetch="""
        hf download openbmb/RLHF-V-Dataset --repo-type dataset --local-dir RLHF-V-Dataset
        then --annotations RLHF-V-Dataset/RLHF-V-Dataset.parquet
    """,
    dropped={"both answers are the same": "nothing to prefer"},
)


def main() -> None:
    with user_errors():
        print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


if __name__ == "__main__":
    main()
