"""VLFeedback: four answers to each question, rated by GPT-4V, made into pairs.

    python data_recipes/vlfeedback.py --annotations vlfeedback_80k.jsonl --pairs best_worst --min_margin 1 --out ROWS

Which pairs: mllm/data/importers/vlfeedback.py. `all`, the default, is what the authors train on.
"""

import json
import sys

from tqdm import tqdm

from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.errors import user_errors

RECIPE = Recipe(
    name="vlfeedback",
    about="VLFeedback: 80 K questions, four answers each (of 12 models), three ratings an answer, made into pairs.",
    source="https://huggingface.co/datasets/MMInstruction/VLFeedback",
    revision="main (the card of 6033b20 was read)",
    licence="none stated on the card; ratings by GPT-4V under OpenAI's terms",
    parts={
        "train": Part(
            files="vlfeedback_80k.jsonl",
            about="The stated number is of questions; the authors count more than 380 K pairs under --pairs all.",
            rows="80,258",
            size="426 MB",
        )
    },
    importer="vlfeedback",
    fetch="""
        hf download MMInstruction/VLFeedback --repo-type dataset --local-dir VLFeedback
        unzip -q VLFeedback/merged_images.zip -d VLFeedback
        then --annotations VLFeedback/vlfeedback_80k.jsonl --media_root VLFeedback, or, where img_path begins with a
        folder that you have elsewhere, --remap FOLDER=DIR
    """,
    dropped={
        "an answer without numeric ratings": "makes no pair (a rating such as N/A cannot be averaged)",
        "a tie": "two answers of the same mean rating make no pair",
        "a difference below min_margin": "makes no pair",
        "both answers are the same": "nothing to prefer",
        "no two answers of clearly different rating": "a question whose answers make no pair at all",
    },
)


def main() -> None:
    with user_errors():
        print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


if __name__ == "__main__":
    main()
