"""The preferences that both sides train on: written once, the same every time.

A pair is an image, an instruction of ten words, and two answers of one length, of which the worse one says every fifth
word differently, as in Re-Align; and another image, which only our `rdpo` looks at. Answers have a lognormal number of
words around 60, as descriptions of LLaVA-Instruct and RLHF-V have, of which the shortest and the longest are as far
apart as there.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from training_benchmark.mixture import make_image, make_words, say

ASKED = 10
MEDIAN_WORDS, SPREAD, FEWEST, MOST = 60, 0.4, 15, 150
CHANGED = 5
"""Of so many words one is another in the worse answer."""


def make_pairs(directory: Path, num_pairs: int, *, seed: int = 0) -> Path:
    """Write `pairs.jsonl` and its JPEGs, unless they are there; returns the file.

    Beside it stands `conversations.jsonl` with the better answers, of which a tokenizer can be made.
    """
    path = directory / "pairs.jsonl"
    if path.is_file():
        return path
    (directory / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    words = make_words(random)
    pairs = [make_pair(number, words, directory, random) for number in range(num_pairs)]
    told = [[*pair["messages"], _assistant(pair["chosen"]["content"])] for pair in pairs]
    _write(directory / "conversations.jsonl", [{"messages": messages} for messages in told])
    _write(path, pairs)
    return path


def make_pair(number: int, words: list[str], directory: Path, random: np.random.Generator) -> dict[str, Any]:
    """One row in the form of `mllm/data/schema.py`."""
    num_words = int(np.clip(random.lognormal(np.log(MEDIAN_WORDS), SPREAD), FEWEST, MOST))
    chosen = say(words, num_words, random).split(" ")
    rejected = [word if place % CHANGED else str(random.choice(words)) for place, word in enumerate(chosen, start=1)]
    own, retrieved = (make_image(directory, f"images/{number:05d}-{kind}.jpg", random) for kind in ("own", "other"))
    question = {"type": "text", "text": say(words, ASKED, random)}
    return {
        "id": f"pair-{number}",
        "source": "pairs",
        "messages": [{"role": "user", "content": [{"type": "image"}, question]}],
        "media": [own],
        "chosen": {"content": " ".join(chosen)},
        "rejected": {"content": " ".join(rejected)},
        "contrast": [retrieved],
    }


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.rename(path)
