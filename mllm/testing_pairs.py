"""Tiny preference rows on disk, for tests."""

import json
from pathlib import Path

from PIL import Image

WORDS = ("a red 3", "two blue 7", "a green 5 and a 1", "nothing", "an 8 in the middle", "a yellow 2, a white 9")


def save_tiny_pairs(
    directory: Path, count: int = 8, *, has_image: bool | tuple[int, ...] = True, side: int = 20
) -> Path:
    """Write `pairs.jsonl` with preference rows: an image, two answers that differ, and a retrieved image.

    Args:
        directory: Where rows and pictures are written.
        count: How many rows.
        has_image: Whether they have images, or the numbers of those that have.
        side: Height of the pictures in pixels; their width differs from row to row.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            is_shown = has_image if isinstance(has_image, bool) else number in has_image
            media = [_picture(directory, f"{number}-{kind}.png", number, kind, side) for kind in ("own", "retrieved")]
            content = [{"type": "image"}] * is_shown + [{"type": "text", "text": f"What is in picture {number}?"}]
            row = {
                "id": number,
                "messages": [{"role": "user", "content": content}],
                "media": media[:1] * is_shown,
                "chosen": {"content": f"There is {WORDS[number % len(WORDS)]}."},
                "rejected": {"content": f"There is {WORDS[(number + 1 + number // 6) % len(WORDS)]}, I think."},
            }
            file.write(json.dumps(row | ({"contrast": media[1:]} if is_shown else {})) + "\n")
    return directory / "pairs.jsonl"


def _picture(directory: Path, name: str, number: int, kind: str, side: int) -> dict:
    shade = 40 * (number % 6)
    colour = (shade, 255 - shade, 90) if kind == "own" else (255 - shade, 30, shade)
    picture = Image.new("RGB", (side + 3 * (number % 3), side), colour)
    for place in range(4):
        picture.putpixel((5 * place % side, (number + 7 * place) % side), (255, 255, 255))
    picture.save(directory / name)
    return {"kind": "image", "path": name, "height": picture.height, "width": picture.width}
