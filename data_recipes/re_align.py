"""Re-Align: pairs of answers, and for each image a retrieved one that the better answer does not describe.

The pairs that were published:

    python data_recipes/re_align.py --annotations preference_data/pref_data.json --media_root train2014 --out ROWS

Pairs of your own rows and model, which is what the paper's figures come from:

    python data_recipes/re_align.py construct --rows ROWS.jsonl --model MODEL --out PAIRS

An answer of the rows is masked phrase by phrase; the model completes it while it looks at an image that is much like
the row's own; if the result differs enough, it is the rejected answer, and that image the contrast. Every step is kept
in PAIRS.work: killed, the program goes on where it was, and asks no endpoint twice.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from mllm.checkpoints import refuse_existing
from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.errors import user_errors
from mllm.preference_data.arguments import ConstructArguments
from mllm.preference_data.components import load_components
from mllm.preference_data.construct import construct_pairs, open_rows, work_directory
from mllm.preference_data.report import report_table

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
        or make pairs of your own rows and model: re_align.py construct --help
    """,
    dropped={
        "both answers are the same": "and there is no retrieved image: nothing to prefer",
        "a record whose two sides repeat different prompts": "is malformed: the pair answers two questions",
    },
    layout={"COCO_train2014_": "COCO 2014, train: names without a folder"},
)


def main() -> None:
    with user_errors():
        if sys.argv[1:2] == ["construct"]:
            construct(sys.argv[2:])
        else:
            print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


def construct(argv: list[str]) -> None:
    """Make pairs of rows; what every step found is kept, and taken up when the program is started again."""
    parser = HfArgumentParser(ConstructArguments, prog="re_align.py construct", description=construct.__doc__)
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    logging.disable_progress_bar()
    out = Path(arguments.out)
    refuse_existing(out)
    opened = open_rows(arguments.source, seed=arguments.seed, progress=bar("reading", None))
    components = load_components(
        arguments, opened, work=work_directory(out), api_key=os.environ.get(arguments.api_key_name, "")
    )
    report = construct_pairs(opened, out, components=components, options=arguments.construction, bar=bar)
    print(report_table(report))
    for role, counts in components.counts.items():
        print(f"{role}: {dict(counts)}")
    print(f"{out}: rows.jsonl, mixture.yaml, report.json, and examples.html to look at")


def bar(title: str, total: int | None) -> Callable[[int], Any]:
    shown = tqdm(desc=title, total=total, unit="", disable=None, leave=False)

    def update(count: int) -> None:
        shown.update(count)
        if shown.n == total:
            shown.close()

    return update


if __name__ == "__main__":
    main()
