"""UnifiedVisual-240K: nine sets that couple understanding and generation, with rationales and images in answers.

    python data_recipes/unified_visual.py --part image_editing --annotations data/FILE.parquet --media_root images
        --columns question=COLUMN answer=COLUMN rationale=COLUMN image=COLUMN output_images=COLUMN --out ROWS

The columns of its parquet files are not documented, so they have to be named; without a name, or with a wrong one, the
error lists the columns that are there. A rationale stands before the answer in the assistant's turn, and an image that
the assistant shows is a content item of that turn: where the text has `<image>`, else behind it.

Rows whose answer holds images can only be learned by a model that draws. They are kept: their meta says
`needs_image_generation: true`, and `recipe.json` counts them.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

from tqdm import tqdm

from mllm.data.importers.base import Drop, Fields, Importer, ImportProblem, Record
from mllm.data.importers.column_map import IMPORTER as COLUMN_MAP
from mllm.data.recipe import Part, Recipe, run_recipe
from mllm.data.sources import Source
from mllm.errors import OptionError, user_errors

DRAWS = ("image_generation", "image_editing", "image_correction")
"""Sets whose every answer shows an image."""

COLUMNS = {
    "question": "what the user asks",
    "answer": "what the assistant says at last",
    "rationale": "what it says before",
    "messages": "in place of these three: a list of messages",
    "image": "the user's images",
    "output_images": "the assistant's images",
    "id": "the row's id",
    "set": "name of the set, where a file holds several: rows of other sets are left out",
}


def convert(record: Record, source: Source) -> Iterator[Fields]:
    """Rows of the column map, marked with their set and with what they ask of a model."""
    part = source.name.rpartition("/")[2]
    columns, fields = dict(source.columns), record.fields
    if not columns:
        raise OptionError(
            f"no --columns; the columns are {', '.join(map(str, fields))}",
            expected="--columns question=... answer=..., and those of rationale and images where there are any",
            do="look at a few rows, and name the columns",
        )
    if (column := columns.pop("set", None)) and plain_name(fields[column]) != plain_name(part):
        raise Drop("of another set")
    has_rationale = bool(fields.get(columns.get("rationale")))
    if has_rationale:
        record, columns = as_messages(record, columns)
    for row in COLUMN_MAP.convert(record, replace(source, columns=columns, options={"optional": ("id", "rationale")})):
        meta = row.setdefault("meta", {})
        if has_rationale:
            meta["rationale_items"] = join_answer(row)
        shown = sum(item["type"] == "image" for item in assistant_items(row))
        if part in DRAWS and not shown:
            raise ImportProblem("an answer without an image; expected one in this set: is output_images mapped?")
        meta |= {"set": part, "needs_image_generation": shown > 0}
        yield row


def as_messages(record: Record, columns: dict[str, str]) -> tuple[Record, dict[str, str]]:
    """The record with question, rationale and answer as three messages: images then find their place in each."""
    said = [("user", "question"), ("assistant", "rationale"), ("assistant", "answer")]
    names = [columns.get(key, key) for _, key in said]
    messages = [
        {"role": role, "content": record.fields.get(name)} for (role, _), name in zip(said, names, strict=True)
    ]
    rest = {key: value for key, value in record.fields.items() if key not in names}
    kept = {key: name for key, name in columns.items() if name not in names}
    return replace(record, fields={**rest, "messages": messages}), {**kept, "messages": "messages"}


def join_answer(row: Fields) -> int:
    """Make one message of rationale and answer; returns how many of its content items are the rationale."""
    user, rationale, answer = row["messages"]
    items = items_of(rationale)
    if items[-1]["type"] == "text":
        items[-1] = {"type": "text", "text": f"{items[-1]['text']}\n\n"}
    row["messages"] = [user, {"role": "assistant", "content": items + items_of(answer)}]
    return len(items)


def items_of(message: Fields) -> list[Fields]:
    """Content of a message as content items."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def assistant_items(row: Fields) -> Iterator[Fields]:
    """Content items of the assistant's messages."""
    for message in row["messages"]:
        if message["role"] == "assistant":
            yield from items_of(message)


def plain_name(text: object) -> str:
    """Letters and digits alone: "Image_Editing" and "image editing" are the same set."""
    return "".join(letter for letter in str(text).lower() if letter.isalnum())


RECIPE = Recipe(
    name="unified_visual",
    about="UnifiedVisual-240K (EMNLP Findings 2025): text or images in, text or images out, with rationales.",
    source="https://huggingface.co/datasets/fnlp-vision/UnifiedVisual-240K (arXiv 2509.14738)",
    revision="main (there is no tag; the columns are not documented)",
    licence="none found; parts by GPT-4, GPT-4o and DALL-E 3 under OpenAI's terms, web pages as their owners say",
    parts={
        "llava_cot": Part("parquet of the LLaVA-CoT subset", "Image and question to rationale and answer.", "60 K"),
        "cot_collection": Part("parquet of the CoT-Collection subset", "Text alone, with rationales.", "60 K"),
        "image_generation": Part("parquet of Image_Generation", "Text to rationale and image.", "22,755"),
        "mm_internet": Part("parquet of MMInternet", "Interleaved pages of the web.", "29,399"),
        "mm_reasoning_t": Part("parquet of MMReasoning_T", "Text answered with helper images.", "7,276"),
        "image_editing": Part("parquet of Image_Editing", "Image and wish to rationale and edited image.", "9,024"),
        "image_correction": Part("parquet of Image_Correctionr (sic)", "Wrong image to the right one.", "20,000"),
        "mm_reasoning_o": Part("parquet of MMReasoning_O", "The rationale shows the original image again.", "21,000"),
        "mm_reasoning_mm": Part("parquet of MMReasoning_MM", "Retrieved images inside the rationale.", "17,761"),
    },
    importer=Importer(
        name="unified_visual",
        about="UnifiedVisual, by --columns",
        matches=lambda fields, source: False,
        convert=convert,
    ),
    fetch="""
        hf download fnlp-vision/UnifiedVisual-240K --repo-type dataset --local-dir UnifiedVisual   (51 GB)
        cd UnifiedVisual/images && for archive in *.tar.gz; do tar xzf $archive; done
        then --media_root UnifiedVisual/images, and --annotations the parquet file of one set
    """,
    dropped={
        "nothing": "rows that need a model which draws are kept, marked and counted (rows_with_target_media)",
        "of another set": "where one file holds several, and a column named by set=COLUMN tells them apart",
    },
    columns=COLUMNS,
)


def main() -> None:
    with user_errors():
        print(json.dumps(run_recipe(RECIPE, sys.argv[1:], progress=tqdm), indent=2))


if __name__ == "__main__":
    main()
