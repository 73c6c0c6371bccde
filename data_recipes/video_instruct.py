"""VideoInstruct-100K: questions and answers about ActivityNet's videos, of Video-ChatGPT.

python data_recipes/video_instruct.py --annotations VideoInstruct100K.json --media_root VIDEOS --out ROWS
"""

import json
import sys

from tqdm import tqdm

from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.errors import user_errors

RECIPE = Recipe(
    name="video_instruct",
    about="VideoInstruct-100K of Video-ChatGPT: questions and answers about 13.3 K videos of ActivityNet.",
    source="https://huggingface.co/datasets/MBZUAI/VideoInstruct-100K",
    revision="main (there is no tag)",
    licence="CC BY-SA 4.0 (annotations); videos under ActivityNet's terms",
    parts={
        "train": Part(
            files="VideoInstruct100K.json",
            about="One question and answer a row; many rows share a video.",
            rows="100 K",
            size="42.4 MB",
        )
    },
    importer="videoinstruct",
    fetch="""
        hf download MBZUAI/VideoInstruct-100K --repo-type dataset --local-dir VideoInstruct-100K
        Videos: ActivityNet 200, train (http://activity-net.org), named v_ID.mp4; other names: --file "{video_id}.mkv"
        then --annotations VideoInstruct-100K/VideoInstruct100K.json --media_root VIDEOS
    """,
    dropped={"the words QA_GT_caption_based_noisy": "cut out of texts: a tag that the script which wrote them left"},
    layout={"v_": "ActivityNet, without a folder"},
)


def main() -> None:
    with user_errors():
        print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


if __name__ == "__main__":
    main()
