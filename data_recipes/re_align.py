"""Re-Align: pairs of answers, and for each image a retrieved one that the better answer does not describe.

python data_recipes/re_align.py --annotations preference_data/pref_data.json --media_root train2014 --out ROWS
"""

import json
import sys

from tqdm import tqdm

from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.errors import user_errors

RECIPE = Recipe(
    name="re_align",
    about="Re-Align's preference data for rDPO: a better and a worse answer, and a retrieved image as contrast.",
    source="https://github.com/taco-group/Re-Align (arXiv 2502.13146)",
    revision="main (433e0d5 was read)",
    licence="Apache-2.0 (repository); answers by GPT-4o mini under OpenAI's terms; images of COCO",
    parts={
        "pref_data": Part(
            files="preference_data/pref_data.json",
            about="The paper speaks of 11 K images sampled from LLaVA-Instruct-150K.",
        )
    },
    importer="re_align",
    fetch="""
        git clone https://github.com/taco-group/Re-Align
        wget http://images.cocodataset.org/zips/train2014.zip && unzip -q train2014.zip
        then --annotations Re-Align/preference_data/pref_data.json --media_root train2014
    """,
    dropped={
        "both answers are the same": "and there is no retrieved image: nothing to prefer",
        "a record whose two sides repeat different prompts": "is malformed: the pair answers two questions",
    },
    layout={"COCO_train2014_": "COCO 2014, train: names without a folder"},
)


def main() -> None:
    with user_errors():
        print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


if __name__ == "__main__":
    main()
