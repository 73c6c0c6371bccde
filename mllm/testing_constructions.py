"""Stand-ins for what constructs pairs, and rows about tiny pictures, for tests."""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllm.data.sources import Source
from mllm.preference_data.construction import Components
from mllm.preference_data.masker import RuleMasker
from mllm.preference_data.phrases import UNANSWERED, Completion, Masked, Task
from mllm.shapes import Float, Tensor

WORDS = ("a red cup", "two blue cups", "a green box", "three dogs", "a white cat", "an old car", "a tall man")


class KilledError(Exception):
    """Stands for the end of a process."""


class StandIns:
    """Every component of a construction, in one: what they are asked and give is noted, and some time they are killed.

    The retrieved image decides the completion: that of image `n` is `WORDS[n % 7]`, in place of every phrase.

    Args:
        life: Results that are given before the end.
        say: From the number of the retrieved image and the masked answer to a completion, in place of that.
        unanswered: Answers, and numbers of images, to which there is no answer.
    """

    def __init__(
        self,
        life: int = 10**9,
        say: Callable[[int, Masked], str] | None = None,
        unanswered: Collection[Any] = (),
    ):
        self.life, self.say, self.unanswered = life, say, unanswered
        self.masked: list[str] = []
        self.completed: list[tuple[str, int]] = []
        self.num_embedded = 0

    def components(self, *, keeps_each: Sequence[str] = ("masker", "completer")) -> Components:
        """These as the components of a construction."""
        facts = {name: {"is": "a stand-in"} for name in ("masker", "embedder", "completer", "similarity")}
        return Components(self, self, self, self, facts=facts, keeps_each=frozenset(keeps_each))

    def mask(self, texts: Sequence[str]) -> Iterator[tuple[int, Masked]]:
        """By rules."""
        for index, masked in RuleMasker().mask(texts):
            self._live()
            if texts[index] in self.unanswered:
                yield index, Masked(texts[index], (), UNANSWERED)
                continue
            self.masked.append(texts[index])
            yield index, masked

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "N D"]:
        """The colours of four blocks, less the grey in the middle."""
        self._live()
        self.num_embedded += len(images)
        small = [np.asarray(image.resize((2, 2), Image.Resampling.BOX), np.float32) - 127.5 for image in images]
        return torch.tensor(np.stack(small).reshape(len(images), -1))

    def complete(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Completion]]:
        """As `say` says; the last comes first."""
        for index, task in reversed(list(enumerate(tasks))):
            self._live()
            images = (item["image"] for message in task.messages for item in message["content"] if "image" in item)
            (image,) = images
            number = int(image.stem) if isinstance(image, Path) else 0
            if number in self.unanswered:
                yield index, Completion("", UNANSWERED)
                continue
            self.completed.append((task.masked.text, number))
            words = [WORDS[number % 7]] * len(task.masked.phrases)
            yield index, Completion(self.say(number, task.masked) if self.say else task.masked.filled(words))

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The share of their words that two texts have in common."""
        self._live()
        return [overlap(*pair) for pair in pairs]

    def _live(self) -> None:
        if not self.life:
            raise KilledError
        self.life -= 1


def overlap(first: str, second: str) -> float:
    """The share of their words that two texts have in common."""
    one, two = set(first.split()), set(second.split())
    return len(one & two) / len(one | two)


def described_row(number: int, **changes: Any) -> dict[str, Any]:
    """A row about the image of this number, with `changes` in place of its own keys."""
    question = [{"type": "image"}, {"type": "text", "text": "What is there?"}]
    answer = [{"type": "text", "text": f"There is {WORDS[number % 7]} on the table."}]
    row = {
        "id": number,
        "source": "world",
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "loss": 0.5}],
        "media": [{"kind": "image", "path": f"images/{number}.png"}],
        "meta": {"note": number},
    }
    return row | changes


def save_described_rows(directory: Path, rows: Sequence[dict[str, Any]], *, num_images: int = 12) -> Source:
    """Write rows, and images `images/NUMBER.png` that differ in their colours."""
    random = np.random.default_rng(0)
    (directory / "images").mkdir()
    for number in range(num_images):
        blocks = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(blocks).resize((20, 20), Image.Resampling.BICUBIC)
        picture.save(directory / f"images/{number}.png")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "rows.jsonl").write_text(lines, encoding="utf-8")
    return Source(directory / "rows.jsonl", licence="CC0")
