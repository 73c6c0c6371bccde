"""Let a model answer the last question of every row of an evaluation file, as is or with its media blanked."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from mllm.errors import RowError
from mllm.inference import generate_answers
from mllm.inference.conversation import AttachPruner
from mllm.processing import TrainingProcessor
from mllm.processing.media import MediaInput

GREY = (128, 128, 128)


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
    pruner: AttachPruner | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 96,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Greedy answers to the rows' last questions.

    Args:
        model: A model to generate with.
        processor: Its processor.
        rows: As `read_evaluation_rows` gives them.
        blank: Whether every medium is replaced by one of its size that shows nothing: what is answered without looking
            or listening.
        pruner: Drops visual tokens of the prompts: called on the model, it is entered as a context.
        batch_size: Conversations generated at once.
        max_new_tokens: Longest answer.
        progress: Called with the number of rows each batch answered.
    """
    return generate_answers(
        model,
        processor,
        [question_of(row) for row in rows],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        pruner=pruner,
        change=blanked if blank else None,
        progress=progress,
    )


def question_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row's messages without the last answer, its media put into their content items."""
    media = iter(row["media"])
    return [
        {"role": message["role"], "content": [_fill(item, media) for item in message["content"]]}
        for message in row["messages"][:-1]
    ]


def blanked(item: MediaInput) -> MediaInput:
    """A medium of the same size that shows or plays nothing."""
    data: Any
    if item.kind == "audio":
        data = np.zeros_like(item.data)
    elif item.kind == "video":
        data = [Image.new("RGB", frame.size, GREY) for frame in item.data]
    else:
        data = Image.new("RGB", item.data.size, GREY)
    return MediaInput(item.kind, data, item.size, item.row)


def _fill(item: dict[str, Any], media: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """A content item with the file it stands for, and what is cut out of that."""
    if item["type"] == "text":
        return item
    found = next(media)
    cut = {key: found[key] for key in ("start", "end") if found.get(key) is not None}
    return {"type": item["type"], item["type"]: found["path"], **cut}
