"""A picture of what pruners leave of a row's media, and of what the model then answers."""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from mllm.evaluation.runner import answer_rows, question_of
from mllm.inference.pruned_media import draw_kept, stacked
from mllm.processing import TrainingProcessor
from mllm.pruning import Pruner


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
