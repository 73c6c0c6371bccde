"""A picture of what pruners leave of a row's media, and of what the model then answers."""

import textwrap
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedModel

from mllm.evaluation.runner import answer_rows, question_of
from mllm.inference.pruned_media import draw_kept
from mllm.processing import TrainingProcessor
from mllm.pruning import Pruner

MARGIN, LETTERS, LINE = 16, 15, 20
PAPER, INK = (255, 255, 255), (0, 0, 0)


def draw_answers(
    model: PreTrainedModel, processor: TrainingProcessor, row: dict[str, Any], pruners: Mapping[str, Pruner]
) -> Image.Image:
    """One under the other: of each pruner its name, what the model answers, and what was left stage by stage.

    Args:
        model: A model to generate with.
        processor: Its processor.
        row: As `mllm.evaluation.runner.read_evaluation_rows` gives them, with a picture or a video.
        pruners: By what they are called.
    """
    lines: list[tuple[str, Image.Image]] = []
    for name, pruner in pruners.items():
        (answer,) = answer_rows(model, processor, [row], pruner=pruner)
        for drawn in draw_kept(processor, question_of(row), pruner.statistics.items[0]):
            lines.append((f"{name}: {answer}", drawn))
    return stacked(lines)


def stacked(lines: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures under each other, each with a text above it."""
    width = max(drawn.width for _, drawn in lines)
    texts = [textwrap.wrap(text, max(width * 2 // LETTERS, 20)) for text, _ in lines]
    heights = [MARGIN + LINE * len(text) + drawn.height for text, (_, drawn) in zip(texts, lines, strict=True)]
    canvas = Image.new("RGB", (width + 2 * MARGIN, sum(heights) + MARGIN), PAPER)
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for text, (_, drawn), height in zip(texts, lines, heights, strict=True):
        for number, line in enumerate(text):
            draw.text((MARGIN, top + LINE * number), line, fill=INK, font=ImageFont.load_default(size=LETTERS))
        canvas.paste(drawn, (MARGIN, top + LINE * len(text)))
        top += height
    return canvas
