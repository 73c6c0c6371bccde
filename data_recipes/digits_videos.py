"""The digits world in motion: small videos of handwritten digits that move or appear, and rows that ask about them.

    python data_recipes/digits_videos.py --world runs/digits --out runs/digits_videos --seed 0

`--world` is what data_recipes/digits.py wrote: its split of the scans holds here, too. In one half of the videos a
digit, sometimes two, moves along a row or a column, in the other two or three appear one after another. Written are

    videos/*.mp4           H.264, 48 x 48 pixels, one to two seconds
    videos.jsonl           all these questions about each video: for supervised fine-tuning
    lessons.jsonl          the same questions about videos written out as text, frame after frame: for a language model
                           that is trained here
    eval/{motion,order}.jsonl
                           one question about each video of unseen handwriting (eval/videos/*.mp4)
    recipe.json            written last: counts, seed, source and licence
"""

import argparse
import json
import os
import random
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

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
CELL = 16  # pixels; the canvas is 3 x 3 cells
SEEN = 3  # frames of a video written out as text; as many as the plan samples
DIRECTIONS = {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down"}
QUESTIONS = {
    "motion": (
        "Which way does the {digit} move?",
        "In which direction does the {digit} move?",
        "Where does the {digit} go?",
    ),
    "first": ("Which digit appears first?", "What is the first digit to appear?"),
    "last": ("Which digit appears last?", "What is the last digit to appear?"),
}
TASKS = ("motion", "order")
TWO_MOVE = 0.2  # share of the videos of motion in which a second digit moves, too
LESSONS = (("order",), ("motion",), ("motion", "opposite"), TASKS)
"""What the lessons are about, a quarter each. What a direction is can be learned from one digit that moves alone, and
only then which of two is asked for; what is not asked for meanwhile is forgotten, so the hardest comes late."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the videos of the digits world.")
    parser.add_argument("--world", type=Path, required=True, help="directory written by data_recipes/digits.py")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must be absent or empty")
    parser.add_argument("--seed", type=int, required=True, help="the same seed gives the same files")
    parser.add_argument("--videos", type=int, default=4000, help="training videos, half of each kind")
    parser.add_argument("--lessons", type=int, default=20000, help="videos written out as text")
    parser.add_argument("--eval_videos", type=int, default=300, help="videos of unseen handwriting, of each kind")
    args = parser.parse_args()
    if min(args.videos, args.eval_videos) < 1 or args.lessons < 0:
        parser.error("--videos and --eval_videos must be at least 1, --lessons at least 0")
    if not (args.world / "recipe.json").is_file():
        parser.error(f"--world {args.world} holds no recipe.json: run data_recipes/digits.py --out {args.world} first")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} already holds files; name a new directory or remove it")

    partial = args.out.with_name(f"{args.out.name}.partial-{os.getpid()}")
    recipe = build(partial, args.world, args.seed, args.videos, args.lessons, args.eval_videos)
    if args.out.exists():
        args.out.rmdir()
    partial.rename(args.out)
    print(json.dumps(recipe, indent=2))


def build(out: Path, world: Path, seed: int, num_videos: int, num_lessons: int, num_eval: int) -> dict:
    """Write every file of the recipe under `out`, which must not exist yet. Returns what `recipe.json` holds."""
    split = json.loads((world / "recipe.json").read_text(encoding="utf-8"))
    data = load_digits()
    scans, labels = (data.images / 16).astype(np.float32), data.target.tolist()
    (out / "videos").mkdir(parents=True)
    (out / "eval" / "videos").mkdir(parents=True)

    rng, by_digit = random.Random(f"{seed}/train"), group_by_digit(split["train_scans"], labels)
    scenes = [DRAW[TASKS[number % 2]](rng, by_digit) for number in range(num_videos)]
    media = write_videos(out, scenes, scans, f"{seed}/train")
    rows = {
        "videos": [questions_row(rng, scene, video) for scene, video in zip(scenes, media, strict=True)],
        # A stream of their own: how many videos there are must not change what the language model learns.
        "lessons": lesson_rows(random.Random(f"{seed}/text"), by_digit, num_lessons),
    }
    rng, by_digit = random.Random(f"{seed}/eval"), group_by_digit(split["eval_scans"], labels)
    scenes = [DRAW[task](rng, by_digit) for task in TASKS for _ in range(num_eval)]
    media = write_videos(out / "eval", scenes, scans, f"{seed}/eval")
    for place, task in enumerate(TASKS):
        part = slice(place * num_eval, (place + 1) * num_eval)
        rows[f"eval/{task}"] = [
            eval_row(rng, scene, video) for scene, video in zip(scenes[part], media[part], strict=True)
        ]

    for name, items in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    recipe = {
        "recipe": "digits_videos",
        "seed": seed,
        "world_seed": split["seed"],
        "rows": {name: len(items) for name, items in rows.items()},
        "videos": num_videos + len(TASKS) * num_eval,
        "source": split["source"],
        "licence": split["licence"],
    }
    (out / "recipe.json").write_text(json.dumps(recipe) + "\n", encoding="utf-8")
    return recipe


# Scenes: digits with their way over the 3 x 3 cells, and when they appear


def group_by_digit(scans: list[int], labels: list[int]) -> list[list[int]]:
    """The scans of 0, of 1, ... of 9."""
    return [[scan for scan in scans if labels[scan] == digit] for digit in range(10)]


def draw_motion(rng: random.Random, by_digit: list[list[int]], *, are_opposite: bool = False) -> dict:
    """One or two different digits, each moving along a row, or each along a column, of its own.

    Args:
        rng: Draws everything.
        by_digit: The scans of each digit.
        are_opposite: Whether there are two, and they move in opposite directions.
    """
    is_horizontal, things = rng.random() < 0.5, []
    count = 2 if are_opposite or rng.random() < TWO_MOVE else 1
    ways = [rng.sample(range(3), 2) for _ in range(count)]
    if are_opposite and (ways[0][0] < ways[0][1]) == (ways[1][0] < ways[1][1]):
        ways[1].reverse()
    for lane, digit, (start, end) in zip(rng.sample(range(3), count), rng.sample(range(10), count), ways, strict=True):
        cells = [(lane, start), (lane, end)] if is_horizontal else [(start, lane), (end, lane)]
        things.append(draw_thing(rng, digit, by_digit, cells=cells, appears=0.0))
    return {"task": "motion", "things": things}


def draw_order(rng: random.Random, by_digit: list[list[int]]) -> dict:
    """Two or three different digits that appear at different moments, each between two of the frames that are seen."""
    count = rng.randint(2, 3)
    moments = [slot and (slot - rng.uniform(0.1, 0.9)) / (SEEN - 1) for slot in rng.sample(range(SEEN), count)]
    places = rng.sample(range(9), count)
    things = [
        draw_thing(rng, digit, by_digit, cells=[divmod(place, 3)] * 2, appears=moment)
        for digit, place, moment in zip(rng.sample(range(10), count), places, moments, strict=True)
    ]
    return {"task": "order", "things": things}


def draw_thing(rng: random.Random, digit: int, by_digit: list[list[int]], *, cells: list, appears: float) -> dict:
    """A digit of one colour and one handwriting, which goes from one cell to another."""
    colour, scan = rng.choice(list(COLOURS)), rng.choice(by_digit[digit])
    return {"digit": digit, "colour": colour, "scan": scan, "cells": cells, "appears": appears}


DRAW = {"motion": draw_motion, "opposite": partial(draw_motion, are_opposite=True), "order": draw_order}


def position(thing: dict, moment: float) -> np.ndarray:
    """Row and column at a moment, 0 for the first frame and 1 for the last, as fractions between cells."""
    start, end = map(np.array, thing["cells"])
    return start + moment * (end - start)


# Videos


def write_videos(out: Path, scenes: list[dict], scans: np.ndarray, seed: str) -> list[dict]:
    """Write one MP4 per scene; returns their media items."""
    rng = np.random.default_rng(list(seed.encode()))
    media = []
    for number, scene in enumerate(tqdm(scenes, desc="videos", unit="video", mininterval=1)):
        path = f"videos/{number:06d}.mp4"
        frames, rate = draw_frames(rng, scene["things"], scans), int(rng.choice([6, 8, 10]))
        write_video(out / path, frames, rate)
        media.append(
            {
                "kind": "video",
                "path": path,
                "height": 3 * CELL,
                "width": 3 * CELL,
                "frames": len(frames),
                "seconds": round(len(frames) / rate, 6),
            }
        )
    return media


def draw_frames(rng: np.random.Generator, things: list[dict], scans: np.ndarray) -> list[np.ndarray]:
    """Eight to twelve frames [48, 48, 3] on a dark, slightly noisy canvas."""
    canvas = rng.uniform(0, 45, size=3) + rng.normal(0, 4, size=(3 * CELL, 3 * CELL, 3))
    looks = [draw_look(rng, thing, scans) for thing in things]
    count, frames = int(rng.integers(8, 13)), []
    for moment in np.linspace(0, 1, count):
        frame = canvas.copy()
        for thing, (ink, colour, offset) in zip(things, looks, strict=True):
            if moment < thing["appears"]:
                continue
            top, left = (CELL * position(thing, moment) + offset).round().astype(int)
            patch = frame[top : top + len(ink), left : left + len(ink)]
            patch += ink * (colour - patch)
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return frames


def draw_look(rng: np.random.Generator, thing: dict, scans: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A digit's ink [side, side, 1], its colour, and where it stands in its cell: all at random, as in a picture."""
    side = int(rng.integers(CELL - 4, CELL + 1))
    ink = np.asarray(Image.fromarray(scans[thing["scan"]]).resize((side, side), Image.Resampling.BICUBIC))
    ink = ink.clip(0, 1)[:, :, None] * rng.uniform(0.8, 1)
    return ink, np.array(COLOURS[thing["colour"]]) + rng.uniform(-10, 10, size=3), rng.integers(0, CELL - side + 1, 2)


def write_video(path: Path, frames: list[np.ndarray], rate: int) -> None:
    """Encode frames as H.264, on one thread and without looking ahead: else one file in a hundred differs."""
    options = {"crf": "14", "preset": "veryfast", "x264-params": "rc-lookahead=0:sync-lookahead=0:no-mbtree=1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.time_base, stream.thread_count = "yuv420p", Fraction(1, rate), 1
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


# Rows


def questions_row(rng: random.Random, scene: dict, video: dict) -> dict:
    """All there is to ask about a video, in any order: where each digit goes, or what comes first and what last."""
    return make_row("digits_videos/videos", all_questions(rng, scene), video, describe(scene))


def eval_row(rng: random.Random, scene: dict, video: dict) -> dict:
    """One question about a video. Its meta holds the answer, for evaluation."""
    question, answer = rng.choice(all_questions(rng, scene))
    source = f"digits_videos/{scene['task']}"
    return make_row(source, [(question, answer)], video, {**describe(scene), "answer": answer})


def describe(scene: dict) -> dict:
    """The task, and digits and scans of a scene as parallel lists."""
    things = scene["things"]
    return {"task": scene["task"]} | {f"{key}s": [thing[key] for thing in things] for key in ("digit", "scan")}


def lesson_rows(rng: random.Random, by_digit: list[list[int]], count: int) -> list[dict]:
    """Questions about videos that are written out where a video would stand: of one kind, the other, then of both."""
    rows = []
    for number in range(count):
        scene = DRAW[rng.choice(LESSONS[number * len(LESSONS) // count])](rng, by_digit)
        (question, answer), *more = all_questions(rng, scene)
        row = make_row("digits_videos/lessons", [(f"{write_out(scene)}\n{question}", answer), *more], None, {})
        rows.append({**row, "id": f"digits_videos/lessons/{number:06d}", "meta": {"tasks": [scene["task"]]}})
    return rows


def all_questions(rng: random.Random, scene: dict) -> list[tuple[str, str]]:
    """Questions about a scene and their answers, in any order."""
    things, asked = scene["things"], []
    if scene["task"] == "motion":
        for thing in things:
            way = np.sign(position(thing, 1) - position(thing, 0)).astype(int).tolist()
            asked.append((rng.choice(QUESTIONS["motion"]).format(digit=thing["digit"]), DIRECTIONS[tuple(way)]))
    else:
        in_turn = sorted(things, key=lambda thing: thing["appears"])
        for name, thing in (("first", in_turn[0]), ("last", in_turn[-1])):
            asked.append((rng.choice(QUESTIONS[name]), str(thing["digit"])))
    rng.shuffle(asked)
    return asked


def write_out(scene: dict) -> str:
    """The frames that are seen, one behind the other, nine words each: `TopLeftRed5 - - ...`."""
    words = []
    for moment in np.linspace(0, 1, SEEN):
        cells = ["-"] * 9
        for thing in scene["things"]:
            if moment >= thing["appears"]:
                row, column = position(thing, moment).round().astype(int).tolist()
                cells[3 * row + column] = f"{ROWS[row]} {COLUMNS[column]} {thing['colour']}".title().replace(" ", "")
                cells[3 * row + column] += str(thing["digit"])
        words += cells
    return " ".join(words)


def make_row(source: str, turns: list[tuple[str, str]], video: dict | None, meta: dict) -> dict:
    """A row of the project's schema; the video, if any, comes first in the first message."""
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    if video is not None:
        messages[0]["content"].insert(0, {"type": "video"})
    name = Path(video["path"]).stem if video else ""
    return {
        "id": f"{source}/{name}",
        "source": source,
        "messages": messages,
        "media": [video] if video else [],
        "meta": meta,
    }


if __name__ == "__main__":
    main()
