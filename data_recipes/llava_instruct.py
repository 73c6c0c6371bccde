"""LLaVA-Instruct, mix665k: the conversations of LLaVA-1.5's second stage.

python data_recipes/llava_instruct.py --annotations llava_v1_5_mix665k.json --media_root DATA --out ROWS
"""

import json
import sys

from tqdm import tqdm

from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.errors import user_errors

RECIPE = Recipe(
    name="llava_instruct",
    about="LLaVA-1.5's mix of instructions: LLaVA, VQA sets, OCR, captions, regions, and ShareGPT's text alone.",
    source="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
    revision="main (llava_v1_5_mix665k.json of October 2023; there is no tag)",
    licence="CC BY 4.0 and OpenAI's terms of use (annotations); images under their sources' terms",
    parts={
        "mix665k": Part(
            files="llava_v1_5_mix665k.json",
            about="Of these about 40 K rows are text alone. Ids repeat: one image serves several kinds of questions.",
            rows="665 K",
            size="1.03 GB",
            # The boxes of Visual Genome are shares of the image padded to a square (LLaVA#606). Those of RefCOCO are
            # said to be either (LLaVA#623, #822); LLaVA itself pads and leaves the numbers alone, and so does this
            # under `pad`.
            coordinates="padded_unit",
        )
    },
    importer="llava",
    fetch="""
        hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json --repo-type dataset --local-dir DATA
        Images, unpacked below DATA:
        coco/train2017  http://images.cocodataset.org/zips/train2017.zip
        gqa/images      https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip
        ocr_vqa/images  the download script of OCR-VQA, all files saved as .jpg (mirror: ej2/llava-ocr-vqa on the Hub)
        textvqa/train_images  https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip
        vg/VG_100K, vg/VG_100K_2  https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip and images2.zip
        then --annotations DATA/llava_v1_5_mix665k.json --media_root DATA
    """,
    dropped={
        "nothing by itself": "OCR-VQA lacks some images, and GIFs among them are named .jpg; --on_missing drop counts",
    },
    layout={
        "coco/train2017/": "COCO 2017, train",
        "gqa/images/": "GQA",
        "ocr_vqa/images/": "OCR-VQA; 355 of 80,000 have no file any more, and one is corrupt",
        "textvqa/train_images/": "TextVQA",
        "vg/VG_100K/": "Visual Genome, part 1",
        "vg/VG_100K_2/": "Visual Genome, part 2",
    },
)


def main() -> None:
    with user_errors():
        print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


if __name__ == "__main__":
    main()
