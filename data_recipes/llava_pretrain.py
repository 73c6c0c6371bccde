"""LLaVA-Pretrain: 558 K images with a caption each, to align a connector.

python data_recipes/llava_pretrain.py --annotations blip_laion_cc_sbu_558k.json --media_root images --out ROWS
"""

import json
import sys

from tqdm import tqdm

from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.errors import user_errors

RECIPE = Recipe(
    name="llava_pretrain",
    about="LLaVA-Pretrain: images of LAION, CC and SBU with BLIP captions, one question and one answer a row.",
    source="https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
    revision="main (the files of 2023; there is no tag)",
    licence="that of CC-3M, and of BLIP for its captions (as the card says); images as their owners say",
    parts={
        "pretrain": Part(
            files="blip_laion_cc_sbu_558k.json",
            about="Captions; the question is one of eleven ways to ask for a short description.",
            rows="558 K",
            size="181 MB",
        )
    },
    importer="llava",
    fetch="""
        hf download liuhaotian/LLaVA-Pretrain --repo-type dataset --local-dir LLaVA-Pretrain
        unzip -q LLaVA-Pretrain/images.zip -d LLaVA-Pretrain/images
        then --annotations LLaVA-Pretrain/blip_laion_cc_sbu_558k.json --media_root LLaVA-Pretrain/images
    """,
    layout={"00": "numbered folders of images.zip"},
)


def main() -> None:
    with user_errors():
        print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


if __name__ == "__main__":
    main()
