"""Pictures of what a pruner left of the media of a conversation, patch by patch."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from mllm.inference.prompt import Messages, encode_prompt
from mllm.processing import StockProcessor, TrainingProcessor
from mllm.processing.media import MediaInput
from mllm.pruning.picture import draw_stages, view_as_seen
from mllm.pruning.statistics import ItemStages

VISUAL = ("image", "video")


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
