"""ShareGPT4V: 100 K captions by GPT-4V, 1,246 K by ShareCaptioner, and LLaVA's instructions with 23 K of them.

    python data_recipes/sharegpt4v.py --part captions --annotations sharegpt4v_instruct_gpt4-vision_cap100k.json ...
    python data_recipes/sharegpt4v.py --part rebuilt_sft --annotations llava_v1_5_mix665k.json ... (see --help)

The part `rebuilt_sft` makes the third file from its parts, for those who have LLaVA's mix and the captions. LLaVA's
detailed descriptions, found in the mix by their id and answer, are replaced in place by captions. How many of each
kind is in the name of the published file: 9 K COCO, 3 K LCS, 9 K SAM and 2 K of the rest. Which of the 100 K were
drawn its authors do not say: captions of an image whose description goes are taken first, the others are drawn by
--seed. The rebuilt mix thus has the published composition, but not the published rows.
"""

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mllm.data.importers.base import BadRecord, Record
from mllm.data.reading.read import read_records
from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.data.recipe_build import Records
from mllm.data.sources import Source
from mllm.errors import OptionError, user_errors

KINDS = {"coco": "coco/", "lcs": "llava/", "sam": "sam/", "rest": ""}
"""Kinds of captions, and how the paths of their images begin."""

QUOTAS = {"coco": 9_000, "lcs": 3_000, "sam": 9_000, "rest": 2_000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("for --part rebuilt_sft")
    group.add_argument("--captions", type=Path, help="sharegpt4v_instruct_gpt4-vision_cap100k.json")
    group.add_argument("--details", type=Path, help="detail_23k.json of LLaVA-Instruct-150K: what is replaced")
    group.add_argument("--seed", type=int, default=0, help="draws captions; default: %(default)s")
    group.add_argument(
        "--quotas", default=",".join(f"{kind}={quota}" for kind, quota in QUOTAS.items()), help="default: %(default)s"
    )


def change_records(records: Records, args: argparse.Namespace, counts: Counter[str]) -> Records:
    """For `rebuilt_sft`: put captions in the place of detailed descriptions. Other parts stay as they are."""
    if args.part != "rebuilt_sft":
        return records
    if args.captions is None or args.details is None:
        raise OptionError("--part rebuilt_sft alone", expected="--captions and --details", do="name both files")
    details = {detail_key(record.fields): image_name(record.fields) for record in objects(args.details)}
    captions = choose_captions(args.captions, set(details.values()), read_quotas(args.quotas), args.seed, counts)
    return replace_details(records, set(details), captions, counts)


def replace_details(
    records: Records, details: set[tuple[str, str]], captions: dict[str, list[dict]], counts: Counter[str]
) -> Iterator[Record | BadRecord]:
    """Every detailed description becomes a caption: of the same image if there is one, else the next one."""
    same_image = {image_name(caption): caption for caption in captions["same image"]}
    others = iter(captions["other image"])
    for record in records:
        fields = record.fields if isinstance(record, Record) and isinstance(record.fields, dict) else {}
        if detail_key(fields) not in details:
            yield record
        elif caption := same_image.pop(image_name(fields), None):
            counts["descriptions replaced by a caption of the same image"] += 1
            yield Record(caption, record.where, record.number)
        elif caption := next(others, None):
            counts["descriptions replaced by a caption of another image"] += 1
            yield Record(caption, record.where, record.number)
        else:
            counts["descriptions kept: no caption left"] += 1
            yield record
    counts["captions not placed"] = len(same_image) + sum(1 for _ in others)


def choose_captions(
    path: Path, wanted_images: set[str], quotas: dict[str, int], seed: int, counts: Counter[str]
) -> dict[str, list[dict]]:
    """The captions that go into the mix, those of wanted images first, as many of each kind as its quota says."""
    by_kind: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for record in objects(path):
        image = str(record.fields.get("image") or "")
        by_kind[next(kind for kind, prefix in KINDS.items() if image.startswith(prefix))].append(record.fields)
    same, other = [], []
    for kind, captions in by_kind.items():
        random.Random(f"{seed}/{kind}").shuffle(captions)
        captions.sort(key=lambda caption: image_name(caption) not in wanted_images)  # stable: still shuffled within
        chosen = captions[: quotas[kind]]
        counts[f"captions drawn: {kind}"] = len(chosen)
        same += [caption for caption in chosen if image_name(caption) in wanted_images]
        other += [caption for caption in chosen if image_name(caption) not in wanted_images]
    random.Random(f"{seed}/order").shuffle(other)
    return {"same image": same, "other image": other}


def detail_key(fields: dict) -> tuple[str, str]:
    """What a row is found by in another file: its id and its first answer. Ids alone repeat."""
    answers = [turn["value"] for turn in fields.get("conversations") or () if turn.get("from") == "gpt"]
    return str(fields.get("id")), answers[0] if answers else ""


def image_name(fields: dict) -> str:
    """Name of the image file; its folder differs between the published files."""
    return str(fields.get("image") or "").rpartition("/")[2]


def objects(path: Path) -> Iterator[Record]:
    for record in read_records(Source(path)):
        if isinstance(record, BadRecord) or not isinstance(record.fields, dict):
            raise OptionError(f"{record.where}: no LLaVA record", expected="the published file", do="fetch it again")
        yield record


def read_quotas(text: str) -> dict[str, int]:
    try:
        quotas = {kind: int(count) for kind, count in (entry.split("=") for entry in text.split(","))}
    except ValueError as error:
        raise OptionError(f"--quotas {text}", expected="KIND=COUNT,...", do="correct it") from error
    if unknown := quotas.keys() - KINDS.keys():
        raise OptionError(f"--quotas of {', '.join(unknown)}", expected=f"some of {', '.join(KINDS)}", do="correct it")
    return dict.fromkeys(KINDS, 0) | quotas


RECIPE = Recipe(
    name="sharegpt4v",
    about="ShareGPT4V: long captions by GPT-4V and ShareCaptioner, for pretraining and for supervised fine-tuning.",
    source="https://huggingface.co/datasets/Lin-Chen/ShareGPT4V (arXiv 2311.12793)",
    revision="main (the files of November 2023; there is no tag)",
    licence="CC BY-NC 4.0 and OpenAI's terms of use; images under their sources' terms, web images for research",
    parts={
        "captions": Part("sharegpt4v_instruct_gpt4-vision_cap100k.json", "By GPT-4V.", rows="102 K", size="134 MB"),
        "pretrain": Part(
            "share-captioner_coco_lcs_sam_1246k_1107.json",
            "By ShareCaptioner: 118 K COCO, 570 K SAM, 558 K LLaVA-Pretrain.",
            rows="1,246 K",
            size="1.5 GB",
        ),
        "sft": Part(
            "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
            "LLaVA's mix665k with 23 K captions in the place of its detailed descriptions.",
            rows="665 K",
            size="1.2 GB",
            coordinates="padded_unit",  # of LLaVA's rows; see llava_instruct.py
        ),
        "rebuilt_sft": Part(
            "llava_v1_5_mix665k.json",
            "The same, made from LLaVA's mix, --captions and --details.",
            rows="665 K",
            size="1.03 GB",
            coordinates="padded_unit",
        ),
    },
    importer="llava",
    fetch="""
        hf download Lin-Chen/ShareGPT4V --repo-type dataset --local-dir ShareGPT4V
        For rebuilt_sft: hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json detail_23k.json ...
        Images as listed below, under one folder: the --media_root
        then --annotations ShareGPT4V/FILE --media_root DATA; if LLaVA-Pretrain was unpacked elsewhere,
        --remap llava/llava_pretrain/images=DIR
    """,
    dropped={
        "nothing by itself": "about 11 K SAM images are in no tar, some web images are gone: --on_missing drop",
    },
    layout={
        "llava/llava_pretrain/images/": "images.zip of liuhaotian/LLaVA-Pretrain",
        "coco/train2017/": "COCO 2017, train",
        "sam/images/": "SA-1B, sa_000000.tar to sa_000050.tar, in one folder (for sft, a zip of 9 K suffices)",
        "gqa/images/": "GQA",
        "ocr_vqa/images/": "OCR-VQA, all files saved as .jpg",
        "textvqa/train_images/": "TextVQA",
        "vg/VG_100K/": "Visual Genome, part 1",
        "vg/VG_100K_2/": "Visual Genome, part 2",
        "share_textvqa/images/": "the project's zip",
        "web-celebrity/images/": "the project's zip",
        "web-landmark/images/": "the project's zip",
        "wikiart/images/": "the project's zip",
    },
    arguments=add_arguments,
    records=change_records,
)


def main() -> None:
    with user_errors():
        print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


if __name__ == "__main__":
    main()
