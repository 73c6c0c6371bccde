"""The rows that both sides train on: written once, the same every time.

Three kinds, in shares that are round numbers in the range of published mixtures:

    kind      share   shape
    text      15 %    dialogues without images (LLaVA-OneVision's single-image mixture has 14 % language data,
                      LLaVA-1.5's 665 k rows have 40 k of ShareGPT's, cut at 2,048 tokens)
    caption   40 %    one image, an instruction and a short caption (LLaVA-Pretrain: 558 k rows of 324 bytes)
    dialogue  45 %    one or two images, several turns (LLaVA-Instruct's conversations: 58 k rows of 2,170 bytes, or
                      about 480 tokens; LLaVA-1.5's whole mix: 1,550 bytes a row)

Lengths are those of the published files times 0.34, as an image here is 196 tokens where LLaVA-1.5 has 576; only
captions keep their dozen words. Text lengths are lognormal, as lengths of texts are. Memory is measured on rows of the
published lengths.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SHARES = {"text": 0.15, "caption": 0.40, "dialogue": 0.45}
MEDIAN_WORDS = {"text": 230, "caption": 12, "dialogue": 125}
SPREAD = {"text": 0.6, "caption": 0.3, "dialogue": 0.5}
MOST_WORDS = {"text": 520, "caption": 30, "dialogue": 400}
ANSWERED = {"text": 0.75, "dialogue": 0.65}
"""Share of a dialogue's words that the assistant says."""
NUM_WORDS = 6_000
SCALED = 0.34
"""What the lengths of published dialogues were multiplied with."""
SIDES = ((480, 640), (640, 480), (427, 640), (500, 375))
"""Heights and widths of COCO's photographs, which most of LLaVA's rows are about."""


def make_mixture(
    directory: Path, num_rows: int, *, shares: dict[str, float] = SHARES, scale: float = 1.0, seed: int = 0
) -> Path:
    """Write `rows.jsonl` and its JPEGs, unless they are there; returns the file.

    Args:
        directory: Where.
        num_rows: How many.
        shares: Of the kinds.
        scale: What lengths of dialogues are multiplied with.
        seed: Of everything.
    """
    path = directory / "rows.jsonl"
    if path.is_file():
        return path
    (directory / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    words = make_words(random)
    # As many of each kind as the shares say, spread evenly by a shuffle: a part of the rows is like the whole.
    ends = np.cumsum(list(shares.values())) * num_rows
    kinds = [list(shares)[int(np.searchsorted(ends, number, side="right"))] for number in range(num_rows)]
    random.shuffle(kinds)
    rows = [make_row(number, str(kind), words, directory, random, scale=scale) for number, kind in enumerate(kinds)]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.rename(path)
    return path


def part_of(path: Path, places: Sequence[int]) -> Path:
    """A file beside `path` with the rows at these places."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(lines[place] for place in places)
    part = path.with_name(f"rows-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl")
    part.write_text(text, encoding="utf-8")
    return part


def make_row(
    number: int, kind: str, words: list[str], directory: Path, random: np.random.Generator, *, scale: float
) -> dict[str, Any]:
    """One row in the form of `mllm/data/schema.py`."""
    num_words = min(MOST_WORDS[kind], random.lognormal(np.log(MEDIAN_WORDS[kind]), SPREAD[kind]))
    num_words = int(num_words if kind == "caption" else scale * num_words)
    num_images = {"text": 0, "caption": 1}.get(kind, 2 if random.random() < 0.1 else 1)
    media = [make_image(directory, f"images/{number:05d}-{item}.jpg", random) for item in range(num_images)]
    if kind == "caption":
        turns = [(8, max(5, num_words))]
    else:
        num_turns = int(random.integers(2, 6))
        asked = max(3, int(num_words * (1 - ANSWERED[kind]) / num_turns))
        turns = [(asked, max(3, num_words // num_turns - asked))] * num_turns
    messages = []
    for turn, (asked, answered) in enumerate(turns):
        images = [{"type": "image"}] * (num_images if turn == 0 else 0)
        messages += [
            {"role": "user", "content": [*images, {"type": "text", "text": say(words, asked, random)}]},
            {"role": "assistant", "content": [{"type": "text", "text": say(words, answered, random)}]},
        ]
    return {"id": f"{kind}-{number}", "source": kind, "messages": messages, "media": media}


def make_image(directory: Path, name: str, random: np.random.Generator) -> dict[str, Any]:
    """Write a JPEG of a photograph's size and detail; returns its media item."""
    height, width = SIDES[int(random.integers(len(SIDES)))]
    colours = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    colours.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    (directory / name).write_bytes(buffer.getvalue())
    return {"kind": "image", "path": name, "height": height, "width": width}


def make_words(random: np.random.Generator) -> list[str]:
    """Invented words."""
    syllables = [
        first + vowel + last for first in "bdfgklmnprstvw" for vowel in "aeiou" for last in ("", "n", "r", "s")
    ]
    return ["".join(random.choice(syllables, size)) for size in random.integers(1, 4, NUM_WORDS)]


def say(words: list[str], count: int, random: np.random.Generator) -> str:
    """So many words, each as often as Zipf's law has it."""
    places = np.minimum(random.zipf(1.2, count) - 1, len(words) - 1)
    return " ".join(words[place] for place in places).capitalize() + "."


def describe_lengths(lengths: list[int], supervised: list[int], sources: list[str]) -> dict[str, Any]:
    """Counts and token lengths by kind, as they are stated in the result."""

    def summary(chosen: list[int]) -> dict[str, Any]:
        tokens, learned = np.array(lengths)[chosen], np.array(supervised)[chosen]
        return {
            "rows": len(chosen),
            "mean_tokens": round(float(tokens.mean()), 1),
            "p5_p50_p95_max": [int(value) for value in (*np.percentile(tokens, [5, 50, 95]), tokens.max())],
            "supervised_share": round(float(learned.sum() / tokens.sum()), 3),
        }

    kinds = {kind: [place for place, source in enumerate(sources) if source == kind] for kind in SHARES}
    return {"all": summary(list(range(len(lengths)))), **{kind: summary(it) for kind, it in kinds.items() if it}}
