"""Pictures of what a pruner left of the media of a conversation, patch by patch."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mllm.inference.prompt import Messages, encode_prompt
from mllm.processing import StockProcessor, TrainingProcessor
from mllm.processing.media import MediaInput
from mllm.pruning.picture import draw_stages, view_as_seen
from mllm.pruning.statistics import ItemStages

VISUAL = ("image", "video")
MARGIN, LETTERS, LINE = 16, 15, 20
PAPER, INK = (255, 255, 255), (0, 0, 0)


def draw_kept(processor: TrainingProcessor, messages: Messages, items: Sequence[ItemStages]) -> list[Image.Image]:
    """Of each picture and video of a conversation, which of its patches are left after each stage.

    Args:
        processor: Of the model.
        messages: The conversation, as it was answered.
        items: Of the pruner's statistics, those of the conversation's row.
    """
    media = [medium.decoded(processor, row=0) for medium in encode_prompt(processor, messages).media]
    seen = [medium for medium in media if medium.kind in VISUAL]
    if not seen:  # the statistics are of another prompt
        return []
    return [draw_item(processor, medium, stages) for medium, stages in zip(seen, items, strict=True)]


def draw_item(processor: TrainingProcessor, medium: MediaInput, stages: ItemStages) -> Image.Image:
    """A picture or video, stage by stage; see `mllm.pruning.picture.draw_stages`."""
    views = views_of(processor, medium)
    return draw_stages(views, stages, _grid(len(views), stages.num_tokens))


def stacked(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures under each other, each with a text above it."""
    width = max(drawn.width for _, drawn in pictures)
    texts = [textwrap.wrap(text, max(width * 2 // LETTERS, 20)) for text, _ in pictures]
    heights = [MARGIN + LINE * len(text) + drawn.height for text, (_, drawn) in zip(texts, pictures, strict=True)]
    canvas = Image.new("RGB", (width + 2 * MARGIN, sum(heights) + MARGIN), PAPER)
    draw, top = ImageDraw.Draw(canvas), MARGIN
    for text, (_, drawn), height in zip(texts, pictures, heights, strict=True):
        for number, line in enumerate(text):
            draw.text((MARGIN, top + LINE * number), line, fill=INK, font=ImageFont.load_default(size=LETTERS))
        canvas.paste(drawn, (MARGIN, top + LINE * len(text)))
        top += height
    return canvas


def views_of(processor: TrainingProcessor, medium: MediaInput) -> list[Image.Image]:
    """What an encoder sees of a picture or video, view by view (tiles, frames).

    Of models whose processors cut pictures into patches themselves there is one view: the picture as it came.
    """
    pixels = next((value for name, value in processor.encode_media([medium]).items() if _are_views(name, value)), None)
    if pixels is None:
        return [medium.data] if medium.kind == "image" else list(medium.data)
    settings = (
        processor.processor.image_processor if isinstance(processor, StockProcessor) else processor.image_processor
    )
    return [view_as_seen(view, settings.image_mean, settings.image_std) for view in pixels.flatten(0, -4)]


def _are_views(name: str, value: Tensor) -> bool:
    return name.startswith("pixel_values") and value.dim() >= 4 and value.shape[-3] == 3


def _grid(num_views: int, num_tokens: int) -> tuple[int, int, int] | None:
    """Views, rows and columns of tokens that stand in squares; None where they do not."""
    side = round((num_tokens / num_views) ** 0.5)
    return (num_views, side, side) if num_views * side * side == num_tokens else None
