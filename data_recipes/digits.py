"""The digits world: pictures of coloured handwritten digits, and rows that ask about them.

The handwriting is real: the 1,797 scans of 8x8 pixels that scikit-learn carries. One to five of them stand, in
colour, on a 3x3 grid of a dark canvas. Scans are split before any picture is drawn, so that no scan seen in training
appears in evaluation.

    python data_recipes/digits.py --out runs/digits --seed 0

With --spread 2 the canvas has 6x6 cells, four at each of the nine places, and a digit stands in one of those four: the
same questions about pictures of which a seventh at most matters.

writes

    images/*.png           the pictures
    cells.jsonl            what stands in each cell: for an encoder that is trained here
    text.jsonl             questions about scenes written out as text, in lessons from easy to hard: for a language
                           model that is trained here
    places.jsonl           per picture a question about a place, then another: to align a connector
    questions.jsonl        the same kinds of questions in any order, and
    caption.jsonl          one caption per picture: for supervised fine-tuning
    eval/{caption,position,count,color,presence}.jsonl, eval/cells.jsonl
                           one question of each kind per picture of unseen handwriting (eval/images/*.png)
    recipe.json            written last: counts, seed, split, source and licence
"""

import argparse
import json
import math
import os
import random
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

COLOURS = {
    "red": (230, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 225, 50),
    "green": (40, 180, 60),
    "blue": (60, 90, 240),
    "purple": (170, 60, 200),
    "white": (240, 240, 240),
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)  # of the nine cells, in reading order
CELL = 16  # pixels; the canvas is 3 x 3 cells
MAX_DIGITS = 5
LESSONS = (  # of the text rows: how many, questions each, fewest digits of a scene, places in its words, kinds
    (1600, 1, 3, False, {"color": 1}),  # one kind at a time, and no scene with one digit: a guess must not pay
    (6400, 3, 3, True, {"color": 1, "position": 4}),
    (4800, 3, 1, True, {"color": 1, "position": 2, "presence": 1, "count": 2}),
    (17600, 1, 1, True, {"color": 1, "position": 2, "presence": 1, "count": 1, "caption": 2}),
)
EVAL_FRACTION = 0.2  # of the scans of each digit
QUESTIONS = {
    "caption": ("Describe the picture.", "What is in the picture?", "Which digits are there, and where?"),
    "position": ("Which digit is in the {place}?", "What is the {place} digit?"),
    "count": ("How many digits are there?", "Count the digits.", "How many digits do you see?"),
    "color": ("What colour is the {digit}?", "Which colour does the {digit} have?", "What color is the {digit}?"),
    "presence": ("Is there {a_digit}?", "Do you see {a_digit}?", "Does the picture show {a_digit}?"),
}
SHORT_TASKS = tuple(task for task in QUESTIONS if task != "caption")
SOURCE_NOTE = "Optical Recognition of Handwritten Digits (UCI), test part, as carried by scikit-learn (load_digits)"
LICENCE_NOTE = "CC BY 4.0 (the UCI repository's terms); E. Alpaydin and C. Kaynak, 1998, doi:10.24432/C50P49"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the digits world: pictures and rows.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must be absent or empty")
    parser.add_argument("--seed", type=int, required=True, help="the same seed gives the same files")
    parser.add_argument("--scenes", type=int, default=8000, help="training pictures")
    parser.add_argument("--text_share", type=float, default=1.0, help="share of the text-only lessons to write")
    parser.add_argument("--eval_scenes", type=int, default=500, help="pictures of unseen handwriting")
    parser.add_argument("--spread", type=int, default=1, help="cells along a side of each of the nine places")
    args = parser.parse_args()
    if min(args.scenes, args.eval_scenes, args.spread) < 1 or not args.text_share > 0:
        parser.error("--scenes, --eval_scenes and --spread must be at least 1, --text_share greater than 0")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} already holds files; name a new directory or remove it")

    partial = args.out.with_name(f"{args.out.name}.partial-{os.getpid()}")
    recipe = build(partial, args.seed, args.scenes, args.text_share, args.eval_scenes, args.spread)
    if args.out.exists():
        args.out.rmdir()
    partial.rename(args.out)
    print(json.dumps(recipe, indent=2))


def build(out: Path, seed: int, num_scenes: int, text_share: float, num_eval_scenes: int, spread: int) -> dict:
    """Write every file of the recipe under `out`, which must not exist yet. Returns what `recipe.json` holds."""
    scans, labels = load_scans()
    train_scans, eval_scans = split_scans(labels, seed)
    (out / "images").mkdir(parents=True)
    (out / "eval" / "images").mkdir(parents=True)

    rng, by_digit = random.Random(f"{seed}/train"), group_by_digit(train_scans, labels)
    scenes = [draw_scene(rng, by_digit) for _ in range(num_scenes)]
    choose_cells(random.Random(f"{seed}/train/cells"), scenes, spread)
    images = draw_images(out, scenes, scans, f"{seed}/train", spread)
    rows = {
        "cells": [cell_row(scene, image, spread) for scene, image in zip(scenes, images, strict=True)],
        "caption": [question_row(rng, "caption", scene, image) for scene, image in zip(scenes, images, strict=True)],
        "places": [questions_row(rng, "places", scene, image) for scene, image in zip(scenes, images, strict=True)],
        "questions": [
            questions_row(rng, "questions", scene, image) for scene, image in zip(scenes, images, strict=True)
        ],
        # A stream of their own: what the pictures' rows draw must not change what the language model learns.
        "text": text_rows(random.Random(f"{seed}/text"), by_digit, text_share),
    }

    rng, by_digit = random.Random(f"{seed}/eval"), group_by_digit(eval_scans, labels)
    scenes = [draw_scene(rng, by_digit) for _ in range(num_eval_scenes)]
    choose_cells(random.Random(f"{seed}/eval/cells"), scenes, spread)
    images = draw_images(out / "eval", scenes, scans, f"{seed}/eval", spread)
    rows["eval/cells"] = [cell_row(scene, image, spread) for scene, image in zip(scenes, images, strict=True)]
    for task in QUESTIONS:
        rows[f"eval/{task}"] = [
            question_row(rng, task, scene, image) for scene, image in zip(scenes, images, strict=True)
        ]

    for name, items in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    recipe = {
        "recipe": "digits",
        "seed": seed,
        "spread": spread,
        "rows": {name: len(items) for name, items in rows.items()},
        "images": num_scenes + num_eval_scenes,
        "train_scans": train_scans,
        "eval_scans": eval_scans,
        "source": SOURCE_NOTE,
        "licence": LICENCE_NOTE,
    }
    (out / "recipe.json").write_text(json.dumps(recipe) + "\n", encoding="utf-8")
    return {**recipe, "train_scans": len(train_scans), "eval_scans": len(eval_scans)}


# Scans and pictures


def load_scans() -> tuple[np.ndarray, list[int]]:
    """The scans, [1797, 8, 8] with values from 0 to 1, and the digit on each."""
    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.tolist()


def split_scans(labels: list[int], seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training and of the evaluation scans: disjoint, the same share of every digit."""
    rng, train, unseen = random.Random(f"{seed}/split"), [], []
    for digit in range(10):
        scans = [scan for scan, label in enumerate(labels) if label == digit]
        rng.shuffle(scans)
        cut = round(len(scans) * EVAL_FRACTION)
        unseen += scans[:cut]
        train += scans[cut:]
    return sorted(train), sorted(unseen)


def group_by_digit(scans: list[int], labels: list[int]) -> list[list[int]]:
    """The scans of 0, of 1, ... of 9."""
    return [[scan for scan in scans if labels[scan] == digit] for digit in range(10)]


# Scenes and pictures


def draw_scene(rng: random.Random, by_digit: list[list[int]], *, min_digits: int = 1) -> list[dict]:
    """Up to five things in different cells, in reading order. Digits may repeat, but at least one stands alone."""
    while True:
        places = sorted(rng.sample(range(len(PLACES)), rng.randint(min_digits, MAX_DIGITS)))
        digits = [rng.randrange(10) for _ in places]
        if single_digits(digits):
            break
    return [
        {"place": place, "digit": digit, "colour": rng.choice(list(COLOURS)), "scan": rng.choice(by_digit[digit])}
        for place, digit in zip(places, digits, strict=True)
    ]


def single_digits(digits: list[int]) -> list[int]:
    """The digits that occur once, so that a question about their colour has one answer."""
    return [digit for digit in digits if digits.count(digit) == 1]


def choose_cells(rng: random.Random, scenes: list[list[dict]], spread: int) -> None:
    """Give each thing one of its place's spread x spread cells: `cell`, counted over the canvas in reading order."""
    for thing in (thing for scene in scenes for thing in scene):
        row, column = (spread * place + rng.randrange(spread) for place in divmod(thing["place"], 3))
        thing["cell"] = 3 * spread * row + column


def draw_images(out: Path, scenes: list[list[dict]], scans: np.ndarray, seed: str, spread: int) -> list[dict]:
    """Write one PNG per scene; returns their media items."""
    rng = np.random.default_rng(list(seed.encode()))
    media = []
    for number, scene in enumerate(scenes):
        path = f"images/{number:06d}.png"
        Image.fromarray(draw_picture(rng, scene, scans, spread)).save(out / path, compress_level=1)
        media.append({"kind": "image", "path": path, "height": 3 * spread * CELL, "width": 3 * spread * CELL})
    return media


def draw_picture(rng: np.random.Generator, scene: list[dict], scans: np.ndarray, spread: int) -> np.ndarray:
    """A dark, slightly noisy canvas [48 * spread, 48 * spread, 3]; digits vary in size, offset and brightness."""
    side = 3 * spread * CELL
    canvas = rng.uniform(0, 45, size=3) + rng.normal(0, 4, size=(side, side, 3))
    for thing in scene:
        size = int(rng.integers(CELL - 4, CELL + 1))
        ink = np.asarray(Image.fromarray(scans[thing["scan"]]).resize((size, size), Image.Resampling.BICUBIC))
        ink = ink.clip(0, 1)[:, :, None] * rng.uniform(0.8, 1)
        row, column = divmod(thing["cell"], 3 * spread)
        top, left = (CELL * cell + int(rng.integers(0, CELL - size + 1)) for cell in (row, column))
        colour = np.array(list(COLOURS.values())[list(COLOURS).index(thing["colour"])]) + rng.uniform(-10, 10, size=3)
        patch = canvas[top : top + size, left : left + size]
        patch += ink * (colour - patch)
    return canvas.clip(0, 255).astype(np.uint8)


# Rows


def cell_row(scene: list[dict], image: dict, spread: int) -> dict:
    """What stands in each cell of the canvas, in reading order; null where a cell is empty."""
    things = {thing["cell"]: thing for thing in scene}
    cells = range(len(PLACES) * spread**2)
    return {
        "media": [image],
        "digits": [things[cell]["digit"] if cell in things else None for cell in cells],
        "colours": [things[cell]["colour"] if cell in things else None for cell in cells],
        "scans": [thing["scan"] for thing in scene],
    }


def question_row(rng: random.Random, task: str, scene: list[dict], image: dict) -> dict:
    """One question about a picture. Its meta holds the scene and the answer, for evaluation."""
    question, answer = ask(rng, task, scene)
    meta = {"task": task, **describe_scene(scene), "answer": answer}
    return make_row(f"digits/{task}", [(question, answer)], image, meta)


def questions_row(rng: random.Random, name: str, scene: list[dict], image: dict) -> dict:
    """Two questions in turn, one of them about a place, which is the hardest to learn; in "places" it comes first.

    No caption beside them: an answer could be read off it.
    """
    tasks = ["position", rng.choice([task for task in SHORT_TASKS if task != "position"])]
    if name != "places":
        rng.shuffle(tasks)
    return make_row(f"digits/{name}", [ask(rng, task, scene) for task in tasks], image, describe_scene(scene))


def text_rows(rng: random.Random, by_digit: list[list[int]], share: float) -> list[dict]:
    """Questions about a scene that is written out where a picture would stand; lesson after lesson."""
    rows = []
    for count, num_questions, min_digits, with_places, weights in LESSONS:
        for _ in range(math.ceil(count * share)):
            scene = draw_scene(rng, by_digit, min_digits=min_digits)
            tasks = rng.choices(list(weights), weights.values(), k=num_questions)
            (question, answer), *more = [ask(rng, task, scene) for task in tasks]
            turns = [(f"{write_cells(scene, with_places=with_places)}\n{question}", answer), *more]
            row = make_row("digits/text", turns, None, {"tasks": tasks, **describe_scene(scene)})
            rows.append({**row, "id": f"digits/text/{len(rows):06d}"})
    return rows


def make_row(source: str, turns: list[tuple[str, str]], image: dict | None, meta: dict) -> dict:
    """A row of the project's schema; the picture, if any, comes first in the first message."""
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    if image is not None:
        messages[0]["content"].insert(0, {"type": "image"})
    name = Path(image["path"]).stem if image else ""
    return {
        "id": f"{source}/{name}",
        "source": source,
        "messages": messages,
        "media": [image] if image else [],
        "meta": meta,
    }


def describe_scene(scene: list[dict]) -> dict:
    """Digits, colours and places of a scene as parallel lists."""
    return {
        "digits": [thing["digit"] for thing in scene],
        "colours": [thing["colour"] for thing in scene],
        "places": [PLACES[thing["place"]] for thing in scene],
    }


# Language


def ask(rng: random.Random, task: str, scene: list[dict]) -> tuple[str, str]:
    """A question of the given kind about the scene, with its answer."""
    digits, place, digit = [thing["digit"] for thing in scene], "", None
    if task == "caption":
        answer = write_caption(scene)
    elif task == "position":
        thing = rng.choice(scene)
        place, answer = PLACES[thing["place"]], str(thing["digit"])
    elif task == "count":
        answer = str(len(scene))
    elif task == "color":
        digit = rng.choice(single_digits(digits))
        answer = next(thing["colour"] for thing in scene if thing["digit"] == digit)
    else:  # presence: a coin decides, so that nothing but the picture tells; present and absent digits are drawn alike
        is_present = rng.random() < 0.5
        digit = rng.choice([d for d in range(10) if (d in digits) == is_present])
        answer = "yes" if is_present else "no"
    question = rng.choice(QUESTIONS[task])
    return question.format(place=place, digit=digit, a_digit=with_article(str(digit))), answer


def write_caption(scene: list[dict]) -> str:
    """A sentence such as: There is a red 5 in the top left and an orange 0 in the bottom right."""
    parts = [f"{with_article(thing['colour'])} {thing['digit']} in the {PLACES[thing['place']]}" for thing in scene]
    return "There is " + " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) + "."


def write_cells(scene: list[dict], *, with_places: bool) -> str:
    """The nine cells in reading order, one word each: `TopLeftRed5 - - - MiddleCentreBlue3 - - - -`, or `Red5 ...`."""
    cells = ["-"] * len(PLACES)
    for thing in scene:
        words = f"{PLACES[thing['place']] if with_places else ''} {thing['colour']}".title().replace(" ", "")
        cells[thing["place"]] = f"{words}{thing['digit']}"
    return " ".join(cells)


def with_article(word: str) -> str:
    """`an 8`, `an orange`, `a red`."""
    return f"{'an' if word[0] in 'aeiou8' else 'a'} {word}"


if __name__ == "__main__":
    main()
