"""A picture of what a pruner did: the image, stage by stage, with the patches that are kept, merged and dropped.

Patches of kept tokens look as they do. Those whose token lives on in another are tinted, and the one it lives on in
has a frame. Dropped ones are dark.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mllm.errors import RowError
from mllm.pruning.statistics import ItemStages
from mllm.shapes import Float, Int, Tensor

Grid = tuple[int, int, int]
"""Views (or frames), rows and columns of an item's tokens."""

SIDE = 288
"""Of a view as it is drawn, in pixels, where it is not smaller in the first place."""
GAP = 8
TITLE = 22
DROPPED, MERGED, FRAME = (24, 24, 28), (40, 120, 255), (255, 176, 0)
FADED = {"dropped": 0.85, "merged": 0.45}
"""How much of the colour covers a patch."""
PAPER, INK = (255, 255, 255), (0, 0, 0)


def fates(stages: ItemStages) -> dict[int, Int[Tensor, " V"]]:
    """In which token each one lives on after each stage: itself where it is kept, -1 where it is dropped."""
    lives_on = torch.arange(stages.num_tokens)
    found = {}
    for layer in sorted(stages.kept):
        kept = stages.kept[layer].cpu()
        into = stages.merged_into.get(layer)
        step = torch.full_like(lives_on, -1) if into is None else into.cpu().clone()
        step[kept] = kept
        lives_on = torch.where(lives_on >= 0, step[lives_on.clamp(min=0)], -1)
        found[layer] = lives_on
    return found


def draw_stages(views: Sequence[Image.Image], stages: ItemStages, grid: Grid | None) -> Image.Image:
    """Draw an item as it came, and once for each stage.

    Args:
        views: The image as the encoder saw it; or the frames of a video, or the tiles, one for each of the grid's
            views. Other numbers of views: patches are drawn without anything in them.
        stages: From `Statistics.items`.
        grid: Of its tokens; None where they stand in none, and are drawn in lines.

    Raises:
        RowError: The grid has another number of tokens than the item.
    """
    grid = grid or _plain_grid(stages.num_tokens)
    if math.prod(grid) != stages.num_tokens:
        raise RowError(
            f"a grid of {' x '.join(map(str, grid))} for {stages.num_tokens} tokens",
            expected="a cell for each token",
            do="pass the grid that the item's `Item.grid` has, or None",
        )
    sized = [_sized(view) for view in views] if len(views) == grid[0] else [_blank(grid)] * grid[0]
    panels = [_titled(_mosaic(sized), f"{stages.num_tokens} tokens")]
    for layer, lives_on in fates(stages).items():
        drawn = [_marked(view, own, grid) for view, own in zip(sized, _by_view(lives_on, grid), strict=True)]
        where = "language model" if layer == 0 else f"layer {layer}"
        panels.append(_titled(_mosaic(drawn), f"into {where}: {len(stages.kept[layer])}"))
    return _side_by_side(panels)


def view_as_seen(pixels: Float[Tensor, "3 H W"], mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """A view as an encoder sees it, cropped and squashed as its processor has it.

    Args:
        pixels: From `pixel_values`.
        mean: The image processor's `image_mean`.
        std: Its `image_std`.
    """
    values = pixels.float().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return Image.fromarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _plain_grid(num_tokens: int) -> Grid:
    """One view, as near to a square as the number has a divisor."""
    rows = next(rows for rows in range(math.isqrt(num_tokens), 0, -1) if num_tokens % rows == 0)
    return 1, rows, num_tokens // rows


def _by_view(lives_on: Int[Tensor, " V"], grid: Grid) -> list[Mapping[str, np.ndarray]]:
    """What is to be drawn in the cells of each view: dropped ones, merged ones, and those that others live on in."""
    own = torch.arange(len(lives_on))
    is_merged = (lives_on >= 0) & (lives_on != own)
    is_target = torch.zeros_like(is_merged)
    is_target[lives_on[is_merged]] = True
    marks = {"dropped": lives_on < 0, "merged": is_merged, "target": is_target}
    cells = {name: mark.view(grid).numpy() for name, mark in marks.items()}
    return [{name: cell[view] for name, cell in cells.items()} for view in range(grid[0])]


def _marked(view: Image.Image, cells: Mapping[str, np.ndarray], grid: Grid) -> Image.Image:
    drawn = view
    for name, colour in (("dropped", DROPPED), ("merged", MERGED)):
        mask = Image.fromarray((cells[name] * np.uint8(round(255 * FADED[name]))).astype(np.uint8))
        cover = Image.new("RGB", view.size, colour)
        drawn = Image.composite(cover, drawn, mask.resize(view.size, Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(drawn)
    height, width = view.height / grid[1], view.width / grid[2]
    for row, column in np.argwhere(cells["target"]).tolist():
        corners = (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1)
        draw.rectangle(corners, outline=FRAME, width=max(1, round(min(height, width) / 10)))
    return drawn


def _sized(view: Image.Image) -> Image.Image:
    scale = SIDE / max(view.size)
    size = (max(1, round(view.width * scale)), max(1, round(view.height * scale)))
    return view.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _blank(grid: Grid) -> Image.Image:
    scale = SIDE / max(grid[1:])
    return Image.new("RGB", (max(1, round(grid[2] * scale)), max(1, round(grid[1] * scale))), (190, 190, 190))


def _mosaic(views: Sequence[Image.Image]) -> Image.Image:
    """Views in lines, as near to a square as may be."""
    columns = math.ceil(math.sqrt(len(views)))
    lines = [_joined(views[start : start + columns]) for start in range(0, len(views), columns)]
    drawn = Image.new("RGB", (max(line.width for line in lines), sum(line.height for line in lines)), PAPER)
    top = 0
    for line in lines:
        drawn.paste(line, (0, top))
        top += line.height
    return drawn


def _titled(panel: Image.Image, title: str) -> Image.Image:
    drawn = Image.new("RGB", (panel.width, panel.height + TITLE), PAPER)
    ImageDraw.Draw(drawn).text((2, 2), title, fill=INK, font=ImageFont.load_default(size=14))
    drawn.paste(panel, (0, TITLE))
    return drawn


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    return _joined(panels, gap=GAP)


def _joined(images: Sequence[Image.Image], *, gap: int = 1) -> Image.Image:
    """From left to right."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    drawn = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    left = 0
    for image in images:
        drawn.paste(image, (left, 0))
        left += image.width + gap
    return drawn
