"""The digits world with sound: beeps, gliding tones and pairs of tones as real files, and rows that ask about them.

    python data_recipes/digits_sounds.py --world runs/digits --out runs/digits_sounds --seed 0

`--world` is what data_recipes/digits.py wrote: one kind of row shows a picture of it, plays some beeps and asks
whether there are as many of these as digits, which neither tells alone. Sounds differ in pitch, timbre, loudness,
noise and length; files in format, sampling rate and channels. Written are

    sounds/*.{wav,flac}    two seconds each, or less
    images/*.png           copies of the world's pictures that stand beside sounds
    tracks.jsonl           what sounds when in each: for an audio encoder that is trained here
    lessons.jsonl          the same questions about sounds and pictures written out as text: for a language model that
                           is trained here
    sounds.jsonl           a question about each sound, and
    both.jsonl             about a picture and a sound: for supervised fine-tuning
    eval/{beeps,glide,tones,match}.jsonl, eval/tracks.jsonl
                           one question about each sound of a random stream of its own (eval/sounds/*), "match" about
                           pictures of unseen handwriting, too
    recipe.json            written last: counts, seed, source and licence
"""

import argparse
import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

QUESTIONS = {
    "beeps": ("How many beeps are there?", "Count the beeps.", "How many beeps do you hear?"),
    "glide": ("Is the tone rising or falling?", "Is this tone falling or rising?", "Rising or falling?"),
    "tones": ("Which tone is higher?", "Which of the two tones is higher?", "Is the first or the second tone higher?"),
    "match": ("Are there as many beeps as digits?", "Do you hear as many beeps as you see digits?"),
}
SOUND_TASKS = ("beeps", "glide", "tones")
LESSON_TASKS = ("match", "beeps", "match", "glide", "match", "tones")
MAX_BEEPS = 5
LONGEST = 2.0  # seconds
PITCHES = (400.0, 1300.0)  # of a sound's middle, in hertz
RATIOS = {"glide": (1.3, 2.2), "tones": (1.2, 2.2)}  # of the higher to the lower end, or tone
RATES = (8000, 16000, 22050, 44100)
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the sounds of the digits world.")
    parser.add_argument("--world", type=Path, required=True, help="directory written by data_recipes/digits.py")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must be absent or empty")
    parser.add_argument("--seed", type=int, required=True, help="the same seed gives the same files")
    parser.add_argument("--sounds", type=int, default=4800, help="training sounds alone, a third of each kind")
    parser.add_argument("--lessons", type=int, default=4800, help="sounds written out as text")
    parser.add_argument("--both", type=int, default=2400, help="training sounds with a picture each")
    parser.add_argument("--eval_sounds", type=int, default=300, help="of each kind, and with a picture")
    args = parser.parse_args()
    if min(args.sounds, args.both, args.eval_sounds) < 1 or args.lessons < 0:
        parser.error("--sounds, --both and --eval_sounds must be at least 1, --lessons at least 0")
    if not (args.world / "recipe.json").is_file():
        parser.error(f"--world {args.world} holds no recipe.json: run data_recipes/digits.py --out {args.world} first")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} already holds files; name a new directory or remove it")

    partial = args.out.with_name(f"{args.out.name}.partial-{os.getpid()}")
    recipe = build(partial, args.world, args.seed, (args.sounds, args.both, args.lessons, args.eval_sounds))
    if args.out.exists():
        args.out.rmdir()
    partial.rename(args.out)
    print(json.dumps(recipe, indent=2))


def build(out: Path, world: Path, seed: int, counts: tuple[int, int, int, int]) -> dict:
    """Write every file of the recipe under `out`, which must not exist yet. Returns what `recipe.json` holds."""
    num_sounds, num_both, num_lessons, num_eval = counts
    for folder in (out, out / "eval"):
        (folder / "sounds").mkdir(parents=True)
        (folder / "images").mkdir()
    rng = random.Random(f"{seed}/train")
    alone = [SOUND_TASKS[number % len(SOUND_TASKS)] for number in range(num_sounds)]
    tracks, rows = write_items(out, rng, [*alone, *["match"] * num_both], read_scenes(world / "caption.jsonl"))
    tables = {"tracks": tracks, "sounds": rows[:num_sounds], "both": rows[num_sounds:]}
    # A stream of their own: how many sounds there are must not change what the language model learns.
    tables["lessons"] = lesson_rows(random.Random(f"{seed}/text"), read_scenes(world / "caption.jsonl"), num_lessons)

    rng = random.Random(f"{seed}/eval")
    tasks = [task for task in QUESTIONS for _ in range(num_eval)]
    tracks, rows = write_items(out / "eval", rng, tasks, read_scenes(world / "eval" / "caption.jsonl"))
    tables |= {"eval/tracks": tracks}
    tables |= {f"eval/{task}": [row for row in rows if row["meta"]["task"] == task] for task in QUESTIONS}

    for name, items in tables.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    split = json.loads((world / "recipe.json").read_text(encoding="utf-8"))
    recipe = {
        "recipe": "digits_sounds",
        "seed": seed,
        "world_seed": split["seed"],
        "rows": {name: len(items) for name, items in tables.items()},
        "sounds": num_sounds + num_both + len(QUESTIONS) * num_eval,
        "source": f"Sounds: made here. Pictures: {split['source']}",
        "licence": split["licence"],
    }
    (out / "recipe.json").write_text(json.dumps(recipe) + "\n", encoding="utf-8")
    return recipe


def read_scenes(rows: Path) -> list[dict]:
    """What the world's pictures show, in parallel lists, with the picture as `image` and its directory as `folder`."""
    scenes = []
    for line in rows.open(encoding="utf-8"):
        row = json.loads(line)
        scenes.append({**row["meta"], "image": row["media"][0], "folder": rows.parent})
    return scenes


def copy_picture(scene: dict, out: Path) -> dict:
    """Put a scene's picture beside our rows: media have to lie below the directory of their rows."""
    image = scene["image"]
    path = f"images/{Path(image['path']).name}"
    shutil.copyfile(scene["folder"] / image["path"], out / path)
    return {**image, "path": path}


def write_items(out: Path, rng: random.Random, tasks: list[str], scenes: list[dict]) -> tuple[list[dict], list[dict]]:
    """Write a sound for each task; returns its track and its row."""
    tracks, rows, noise = [], [], np.random.default_rng(rng.randrange(2**63))
    for number, task in enumerate(tqdm(tasks, desc="sounds", unit="sound", mininterval=1)):
        scene = scenes[number % len(scenes)] if task == "match" else None
        events, answer = draw_events(rng, task, len(scene["digits"]) if scene else 0)
        form, rate = rng.choice(("wav", "flac")), rng.choice(RATES)
        samples = play(noise, events, rate)
        if rng.random() < 0.2:  # louder on one side
            samples = samples[:, None] * np.array([1.0, rng.uniform(0.3, 0.9)])
        path = f"sounds/{number:06d}.{form}"
        soundfile.write(out / path, samples, rate, subtype="PCM_16")
        sound = {"kind": "audio", "path": path, "seconds": len(samples) / rate}
        question = rng.choice(QUESTIONS[task])
        media = [sound] if scene is None else rng.sample([copy_picture(scene, out), sound], 2)
        tracks.append({"media": [sound], "events": events})
        rows.append(make_row(task, number, question, answer, media))
    return tracks, rows


# Sounds: events [start, end, hertz at the start, hertz at the end], in seconds


def draw_events(rng: random.Random, task: str, num_digits: int) -> tuple[list[list[float]], str]:
    """What sounds when, and the answer to the task's question."""
    middle, start = math.exp(rng.uniform(*map(math.log, PITCHES))), rng.uniform(0.02, 0.2)
    if task in ("beeps", "match"):
        others = [count for count in range(1, MAX_BEEPS + 1) if count != num_digits]
        is_equal = task == "match" and rng.random() < 0.5
        count = num_digits if is_equal else rng.choice(others)
        events, length = [], rng.uniform(0.08, 0.15)
        for _ in range(count):
            events.append([start, start + length, middle, middle])
            start += length + rng.uniform(0.09, 0.22)
        return events, str(count) if task == "beeps" else ("yes" if is_equal else "no")
    ratio = math.exp(rng.uniform(*map(math.log, RATIOS[task])))
    low, high = middle / math.sqrt(ratio), middle * math.sqrt(ratio)
    if task == "glide":
        length, is_rising = rng.uniform(0.6, 1.6), rng.random() < 0.5
        ends = (low, high) if is_rising else (high, low)
        return [[start, start + length, *ends]], "rising" if is_rising else "falling"
    (first, second), gap = rng.sample((low, high), 2), rng.uniform(0.08, 0.3)
    one, two = rng.uniform(0.25, 0.6), rng.uniform(0.25, 0.6)
    later = start + one + gap
    return [
        [start, start + one, first, first], [later, later + two, second, second]
    ], "first" if first > second else "second"  # fmt: skip


def play(rng: np.random.Generator, events: list[list[float]], rate: int) -> np.ndarray:
    """Samples [N] of some events: a tone with an overtone, soft edges, some noise, and silence at the end."""
    seconds = min(events[-1][1] + rng.uniform(0.03, 0.4), LONGEST)
    samples = rng.normal(0, 10 ** rng.uniform(-4, -2), round(seconds * rate))
    loudness, overtone = rng.uniform(0.1, 0.6), rng.uniform(0, 0.5)
    for start, end, low, high in events:
        first, last = round(start * rate), min(round(end * rate), len(samples))
        moments = np.arange(last - first) / rate
        bend = math.log(high / low) / (end - start)  # the pitch changes by equal intervals in equal times
        turns = low * moments if low == high else low * np.expm1(bend * moments) / bend
        wave = np.sin(2 * np.pi * turns) + overtone * np.sin(4 * np.pi * turns)
        edge = np.minimum(1, np.minimum(moments, moments[::-1]) / 0.01)
        samples[first:last] += loudness * edge * wave
    return samples.clip(-1, 1)


# Rows


def lesson_rows(rng: random.Random, scenes: list[dict], count: int) -> list[dict]:
    """Questions about sounds that are written out where a sound would stand, as are the pictures beside them."""
    rows = []
    for number in range(count):
        task, scene = LESSON_TASKS[number % len(LESSON_TASKS)], scenes[number % len(scenes)]
        events, answer = draw_events(rng, task, len(scene["digits"]))
        parts = [write_out(events)] if task != "match" else rng.sample([write_out(events), write_cells(scene)], 2)
        row = make_row(task, number, "\n".join([*parts, rng.choice(QUESTIONS[task])]), answer, [])
        rows.append({**row, "id": f"digits_sounds/lessons/{number:06d}", "meta": {"tasks": [task]}})
    return rows


def write_out(events: list[list[float]]) -> str:
    """A word for each event, its number and how its pitch changes: `Sound1 Sound2Same`, `Sound1Rising`."""
    return " ".join(f"Sound{number + 1}{change(events, number)}" for number in range(len(events)))


def change(events: list[list[float]], number: int) -> str:
    """How the pitch of an event changes, or where it stays what it was, how it differs from that of the one before."""
    _, _, low, high = events[number]
    if low != high:
        return "Rising" if low < high else "Falling"
    if not number:
        return ""
    before = events[number - 1][3]
    return "Same" if low == before else "Up" if low > before else "Down"


def write_cells(scene: dict) -> str:
    """A picture's nine cells in reading order, as the world's own lessons write them: `TopLeftRed5 - - ...`."""
    cells = ["-"] * len(PLACES)
    for digit, colour, place in zip(scene["digits"], scene["colours"], scene["places"], strict=True):
        cells[PLACES.index(place)] = f"{place} {colour}".title().replace(" ", "") + str(digit)
    return " ".join(cells)


def make_row(task: str, number: int, question: str, answer: str, media: list[dict]) -> dict:
    """A row of the project's schema, its media in front of the question. Its meta holds the answer, for evaluation."""
    asked = [*({"type": item["kind"]} for item in media), {"type": "text", "text": question}]
    return {
        "id": f"digits_sounds/{task}/{number:06d}",
        "source": f"digits_sounds/{task}",
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "media": media,
        "meta": {"task": task, "answer": answer},
    }


if __name__ == "__main__":
    main()
