"""Rows with several pictures, pictures in tiles, and videos, for tiny models; for tests of what reads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mllm.sizes import num_tokens
from mllm.sizes.rules import num_vectors
from mllm.testing import tiny_model
from mllm.testing_stock import IMAGE_SIDE, tiny_stock_model

Item = tuple[str, list[int]]
"""Kind of an item, and how many of its tokens follow one another before a word stands between them."""


@dataclass(frozen=True)
class VisualBatch:
    """A batch, and what is in it.

    Args:
        model: Tiny, of a stock class.
        inputs: As a processor would make them.
        items: Of each row, how many tokens each of its items has, in order.
        tokens: The placeholders.
    """

    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]
    items: list[list[int]]
    tokens: tuple[int, ...]

    @property
    def is_visual(self) -> torch.Tensor:
        """Which tokens are visual [B, T]."""
        return torch.isin(self.inputs["input_ids"], torch.tensor(self.tokens))


def visual_batch(name: str) -> VisualBatch:
    """Two rows of unlike length, and one of text alone; shorter ones are padded at their end.

    Args:
        name: One of `VISUAL_BATCHES`.
    """
    family, fields, make = VISUAL_BATCHES[name]
    torch.manual_seed(7)
    model = tiny_stock_model(family, **fields)
    tensors, rows = make(model)
    tokens = {"image": model.config.image_token_id}
    if any(kind == "video" for row in rows for kind, _ in row):
        tokens["video"] = model.config.video_token_id
    batch = _batch(model, tensors, rows, tokens)
    if family.startswith("qwen"):
        is_video = batch.inputs["input_ids"] == model.config.video_token_id
        batch.inputs["mm_token_type_ids"] = batch.is_visual.long() + is_video.long()
    return batch


def composed_visual_batch(directory: Path, **parts: Any) -> VisualBatch:
    """The same of a composed model: three pictures of several sizes, and two videos where it reads videos.

    Args:
        directory: Where its parts are made.
        **parts: See `save_tiny_parts`.
    """
    model = tiny_model(directory, **parts)[0]
    rule = model.model.image_tower.rule
    sizes = [(20, 30), (16, 16), (40, 10)]
    num_views = sum(len(rule.views(size)) for size in sizes)
    tensors = {
        "pixel_values": _pixels(num_views, 3, rule.image_size, rule.image_size),
        "image_sizes": torch.tensor(sizes),
    }
    images: list[Item] = [("image", [num_tokens(size, rule)]) for size in sizes]
    rows = [images[:2], images[2:]]
    if "video" in parts:
        of_video = model.model.video_tower.rule
        frames = [3, 1]
        tensors["pixel_values_videos"] = _pixels(sum(frames), 3, rule.image_size, rule.image_size)
        tensors["video_sizes"] = torch.tensor(frames)
        counts = [num_vectors(of_video.views_of_frames(one), (one,), of_video) for one in frames]
        rows = [[images[0], ("video", [counts[0]]), images[1]], [("video", [counts[1]]), images[2]]]
    tokens = {kind: tower.placeholder_token_id for kind, tower in model.config.tower_configs.items()}
    return _batch(model, tensors, rows, tokens)


def _batch(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor], rows: list[list[Item]], tokens: Mapping[str, int]
) -> VisualBatch:
    rows = [*rows, []]
    ids = [_words(tokens, row, seed=number) for number, row in enumerate(rows)]
    longest = max(map(len, ids))
    inputs = {
        "input_ids": torch.tensor([row + [1] * (longest - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
        **tensors,
    }
    return VisualBatch(model, inputs, [[sum(runs) for _, runs in row] for row in rows], tuple(tokens.values()))


def _words(tokens: Mapping[str, int], row: list[Item], *, seed: int) -> list[int]:
    """Random words with placeholders between them; before each picture's last stretch stands the same word."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 300, (3,), generator=generator).tolist()
    for kind, runs in row:
        for number, length in enumerate(runs, 1):
            ids += [2 + (number < len(runs)) * number] + [tokens[kind]] * length
        ids += torch.randint(20, 300, (2,), generator=generator).tolist()
    return ids + torch.randint(20, 300, (3,), generator=generator).tolist()


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


Rows = tuple[dict[str, torch.Tensor], list[list[Item]]]


def _single(model: PreTrainedModel) -> Rows:
    """LLaVA: two pictures, and one."""
    return {"pixel_values": _pixels(3, 3, IMAGE_SIDE, IMAGE_SIDE)}, [[("image", [4])] * 2, [("image", [4])]]


def _any_size(model: PreTrainedModel) -> Rows:
    """LLaVA with a Pixtral, which reads pictures of any size as one sequence: two pictures, and one."""
    sizes = torch.tensor([[8, 16], [16, 16], [12, 4]])
    tensors = {"pixel_values": _pixels(3, 3, IMAGE_SIDE, IMAGE_SIDE), "image_sizes": sizes}
    return tensors, [[("image", [8]), ("image", [16])], [("image", [3])]]


def _tiled(model: PreTrainedModel) -> Rows:
    """LLaVA-NeXT: a wide picture, a high and thin one, a square one; tiles that a picture lacks are zeros."""
    sizes = torch.tensor([[10, 30], [40, 12], [30, 30]])
    pixels = _pixels(3, 5, 3, IMAGE_SIDE, IMAGE_SIDE)
    pixels[:2, 3:] = 0
    found = model.get_image_features(pixels, sizes, return_dict=True).pooler_output
    lengths = [len(one) for one in found]
    return {"pixel_values": pixels, "image_sizes": sizes}, [
        [("image", [lengths[0]]), ("image", [lengths[1]])],
        [("image", [lengths[2]])],
    ]


def _large(model: PreTrainedModel) -> Rows:
    """LLaVA-OneVision: pictures of so many tiles that their map is made smaller."""
    sizes = torch.tensor([[60, 64], [30, 60]])
    pixels = _pixels(2, 17, 3, IMAGE_SIDE, IMAGE_SIDE)
    pixels[1, 9:] = 0
    found = model.get_image_features(pixels, sizes, return_dict=True).pooler_output
    return {"pixel_values": pixels, "image_sizes": sizes}, [[("image", [len(one)])] for one in found]


def _images_and_video(model: PreTrainedModel) -> Rows:
    """LLaVA-OneVision: two pictures of one view each in a row, behind a video; a picture in tiles, and a video."""
    sizes = torch.tensor([[16, 16], [16, 16], [16, 30]])
    pixels = _pixels(3, 3, 3, IMAGE_SIDE, IMAGE_SIDE)
    pixels[:2, 1:] = 0
    videos = _pixels(2, 3, 3, IMAGE_SIDE, IMAGE_SIDE)
    counts = torch.tensor([2, 1, 0])
    found = model.get_image_features(pixels, sizes, batch_num_images=counts, return_dict=True).pooler_output
    video = model.get_video_features(videos, return_dict=True).pooler_output.shape[1]
    tensors = {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": counts, "pixel_values_videos": videos}
    lengths = [len(one) for one in found]
    return tensors, [
        [("video", [video]), ("image", [lengths[0]]), ("image", [lengths[1]])],
        [("image", [lengths[2]]), ("video", [video])],
    ]


def _tiles_in_one_run(model: PreTrainedModel) -> Rows:
    """InternVL: a picture of three tiles and one of one, then one of two."""
    return {"pixel_values": _pixels(6, 3, IMAGE_SIDE, IMAGE_SIDE)}, [
        [("image", [12]), ("image", [4])],
        [("image", [8])],
    ]


def _tiles_between_words(model: PreTrainedModel) -> Rows:
    """SmolVLM: a picture of two tiles and the whole, and one without tiles; then one. Missing tiles are zeros."""
    pixels = _pixels(3, 4, 3, IMAGE_SIDE, IMAGE_SIDE)
    pixels[1, 1:] = pixels[2] = 0
    return {"pixel_values": pixels}, [[("image", [4, 4, 4]), ("image", [4])], [("image", [4])]]


def _grids(model: PreTrainedModel) -> Rows:
    """Qwen2.5-VL: a wide picture and a video, then a small picture."""
    return _of_patches(model, [(1, 4, 12), (1, 4, 4)], (2, 4, 4), [8])


def _grids_and_times(model: PreTrainedModel) -> Rows:
    """Qwen3-VL: the same, with a word between the frames of a video."""
    return _of_patches(model, [(1, 4, 12), (1, 4, 4)], (2, 4, 4), [4, 4])


def _of_patches(model: PreTrainedModel, images: list[tuple], video: tuple, runs: list[int]) -> Rows:
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    grids, of_video = torch.tensor(images), torch.tensor([video])
    tensors = {
        "pixel_values": _pixels(int(grids.prod(-1).sum()), width),
        "image_grid_thw": grids,
        "pixel_values_videos": _pixels(int(of_video.prod()), width),
        "video_grid_thw": of_video,
    }
    return tensors, [[("image", [12]), ("video", runs)], [("image", [4])]]


_GRIDS = [[IMAGE_SIDE * rows, IMAGE_SIDE * columns] for rows in range(1, 5) for columns in range(1, 5)]

_PIXTRAL = {
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIDE,
        "patch_size": 4,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}

VISUAL_BATCHES: dict[str, tuple[str, dict[str, Any], Callable[[PreTrainedModel], Rows]]] = {
    "llava": ("llava", {}, _single),
    "llava, pixtral": ("llava", _PIXTRAL, _any_size),
    "llava_next": ("llava_next", {}, _tiled),
    "llava_onevision": ("llava_onevision", {}, _images_and_video),
    "llava_onevision, large": ("llava_onevision", {"image_grid_pinpoints": _GRIDS}, _large),
    "internvl": ("internvl", {}, _tiles_in_one_run),
    "smolvlm": ("smolvlm", {}, _tiles_between_words),
    "idefics3": ("idefics3", {}, _tiles_between_words),
    "qwen2_5_vl": ("qwen2_5_vl", {}, _grids),
    "qwen3_vl": ("qwen3_vl", {}, _grids_and_times),
}
"""Family, fields of its config, and what makes its media."""
