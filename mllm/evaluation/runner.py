"""Let a model answer the last question of every row of an evaluation file, as is or with its pictures blanked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from mllm.errors import RowError
from mllm.inference import generate_answers
from mllm.processing import TrainingProcessor


def read_evaluation_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, each with its media paths made absolute.

    Raises:
        RowError: A line is no row, or its last message is not an assistant's.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if row["messages"][-1]["role"] != "assistant":
            raise RowError(
                f"{path}:{number} ends with a message of {row['messages'][-1]['role']!r}",
                expected="a last message of the assistant: the answer that is asked for",
                do="end every evaluation row with its reference answer",
            )
        for item in row["media"]:
            item["path"] = str(path.parent / item["path"])
        rows.append(row)
    return rows


def answer_rows(
    model: PreTrainedModel,
    processor: TrainingProcessor,
    rows: list[dict[str, Any]],
    *,
    blank: bool = False,
    batch_size: int = 64,
    max_new_tokens: int = 96,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Greedy answers to the rows' last questions.

    Args:
        model: A model to generate with.
        processor: Its processor.
        rows: As `read_evaluation_rows` gives them.
        blank: Whether every picture is replaced by one of mid-grey of its size: what is answered without looking.
        batch_size: Conversations generated at once.
        max_new_tokens: Longest answer.
        progress: Called with the number of rows each batch answered.
    """
    return generate_answers(
        model,
        processor,
        [question_of(row, blank=blank) for row in rows],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )


def question_of(row: dict[str, Any], *, blank: bool = False) -> list[dict[str, Any]]:
    """The row's messages without the last answer, its images put into their content items."""
    images = iter([item for item in row["media"] if item["kind"] == "image"])
    return [
        {"role": message["role"], "content": [_fill(item, images, blank) for item in message["content"]]}
        for message in row["messages"][:-1]
    ]


def _fill(item: dict[str, Any], images, blank: bool) -> dict[str, Any]:
    if item["type"] != "image":
        return item
    media = next(images)
    if blank:
        return {"type": "image", "image": Image.new("RGB", (media["width"], media["height"]), (128, 128, 128))}
    return {"type": "image", "image": media["path"]}
