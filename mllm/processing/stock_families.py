"""transformers' own processors of multimodal models: what each needs to know of media to count their tokens.

A stock processor replaces the token that a template writes for a media item by a text of its own
(`replace_image_token`), and decides by what its image processor has made of the item. The functions here tell it the
same from the item's size alone, so that no file has to be opened to know how long a row is.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from mllm.errors import OptionError, RowError
from mllm.processing.chat import Placeholder
from mllm.sizes import LONGEST_SOUND, MediaSize

Sizes = Sequence[MediaSize]
Facts = Callable[[ProcessorMixin, Sizes], dict[str, Any]]
"""What a stock `replace_..._token` reads of a processed batch, from the sizes of one conversation's media."""


def _image_placeholders(processor: ProcessorMixin) -> dict[str, Placeholder]:
    return {"image": Placeholder(processor.image_token, processor.image_token)}


@dataclass(frozen=True)
class StockFamily:
    """What is particular about a stock processor.

    Args:
        facts: By kind of media; the kinds are those the model is trained on here.
        types: Name under which the model wants the tokens of media marked; None where it does not.
        media_by_row: Whether an item is processed by how many others its row has.
        placeholders: The tokens that stand for media.
    """

    facts: Mapping[str, Facts]
    types: str | None = None
    media_by_row: bool = False
    placeholders: Callable[[ProcessorMixin], dict[str, Placeholder]] = _image_placeholders


def _one_tile(processor: ProcessorMixin, sizes: Sizes) -> dict[str, Any]:
    """LLaVA: every image becomes one of the same size."""
    return {"pixel_values": [_blank(*_tile(processor))] * len(sizes)}


def _tiles_and_sizes(processor: ProcessorMixin, sizes: Sizes) -> dict[str, Any]:
    """LLaVA-NeXT and -OneVision: tiles of one size, as many as the image's own size asks for."""
    return {
        "pixel_values": [[_blank(*_tile(processor))]],
        "image_sizes": [[int(side) for side in size] for size in sizes],
        "batch_num_images": [len(sizes)],
    }


def _patches(processor: ProcessorMixin, sizes: Sizes) -> dict[str, Any]:
    """Qwen-VL: as many patches as fit; only their number counts."""
    numbers = [processor.image_processor.get_number_of_image_patches(*map(int, size), {}) for size in sizes]
    return {"image_grid_thw": np.array(numbers, np.int64).reshape(-1, 1)}


def _crops(processor: ProcessorMixin, sizes: Sizes) -> dict[str, Any]:
    """InternVL: tiles of one size and an overview."""
    counted = processor._get_num_multimodal_tokens(image_sizes=[[int(side) for side in size] for size in sizes])
    return {"num_patches": counted["num_image_patches"]}


def _rows_and_columns(processor: ProcessorMixin, sizes: Sizes) -> dict[str, Any]:
    """Idefics3 and SmolVLM: a grid of tiles and an overview, each marked by its place.

    `get_number_of_image_patches` rounds otherwise than the image processor itself where the longest edge is no
    multiple of a tile's; so its own steps are taken, on pictures without pixels.
    """
    splitter = _without_pixels(processor.image_processor)
    grids = [_grid(splitter, *map(int, size)) for size in sizes]
    return {"rows": [[rows for rows, _ in grids]], "cols": [[columns for _, columns in grids]]}


def _grid(splitter: Any, height: int, width: int) -> tuple[int, int]:
    image = _blank(height, width)
    if splitter.do_resize:
        image = splitter.resize(image, splitter.size)
    if not splitter.do_image_splitting:
        return 0, 0
    image = splitter.resize_for_vision_encoder(image, splitter.max_image_size["longest_edge"])
    return splitter.split_images(image, max_image_size=splitter.max_image_size)[1:]


def _without_pixels(image_processor: Any) -> Any:
    """The image processor with a `resize` that gives a blank picture of the right size."""
    backend = type(image_processor)
    output_size = _OUTPUT_SIZE[backend.__name__]
    splitter = copy.copy(image_processor)

    def resize(image: np.ndarray, size: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        height, width = output_size(image, size.longest_edge) if size.longest_edge else (size.height, size.width)
        return _blank(height, width)

    splitter.resize = resize
    return splitter


def _longest_edge_idefics3(image: np.ndarray, longest_edge: int) -> tuple[int, int]:
    from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

    return get_resize_output_image_size(image, resolution_max_side=longest_edge)


def _longest_edge_smolvlm(image: np.ndarray, longest_edge: int) -> tuple[int, int]:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import get_resize_output_image_size

    return get_resize_output_image_size(image, resolution_max_side=longest_edge)


_OUTPUT_SIZE = {
    "Idefics3ImageProcessorPil": _longest_edge_idefics3,
    "SmolVLMImageProcessorPil": _longest_edge_smolvlm,
}


def _no_crops(processor: ProcessorMixin, sizes: Sizes) -> dict[str, Any]:
    """Gemma 3: every image becomes one of the same size, if pan and scan is off, as it is by default."""
    if processor.image_processor.do_pan_and_scan:
        raise OptionError(
            "an image processor with do_pan_and_scan",
            expected="none, as Gemma 3 was trained",
            do="set `do_pan_and_scan` to false in the checkpoint's preprocessor_config.json",
        )
    return {"num_crops": [0] * len(sizes)}


def _mel_frames(processor: ProcessorMixin, sizes: Sizes) -> dict[str, Any]:
    """Qwen2-Audio: one token for four mel frames."""
    extractor = processor.feature_extractor
    numbers = []
    for seconds in (float(size[0]) for size in sizes):
        longest = extractor.n_samples / extractor.sampling_rate
        samples = num_samples(longest if seconds == LONGEST_SOUND else seconds, extractor.sampling_rate)
        if not 0 < samples <= extractor.n_samples:
            raise RowError(
                f"a sound of {seconds:g} seconds",
                expected=f"more than 0 and at most {longest:g} seconds",
                do="give the media item `start` and `end`, or drop the row",
            )
        frames = -(-samples // extractor.hop_length)
        numbers.append(((frames - 1) // 2 + 1 - 2) // 2 + 1)
    return {"num_audio_tokens": numbers}


def num_samples(seconds: float, sampling_rate: int) -> int:
    """How many samples stand for so many seconds."""
    return round(seconds * sampling_rate)


def _tile(processor: ProcessorMixin) -> tuple[int, int]:
    """Height and width of what the encoder sees at once."""
    settings = processor.image_processor
    size = settings.crop_size if settings.do_center_crop else settings.size
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    if size.get("shortest_edge") and settings.do_pad:
        return size["shortest_edge"], size["shortest_edge"]
    raise OptionError(
        f"an image processor whose output has no fixed size: {dict(size)}",
        expected="a crop_size, or a size with height and width",
        do="correct the checkpoint's preprocessor_config.json",
    )


def _blank(height: int, width: int) -> np.ndarray:
    """A picture of this size that takes no memory."""
    return np.broadcast_to(np.float32(0), (3, height, width))


def _gemma3_placeholders(processor: ProcessorMixin) -> dict[str, Placeholder]:
    return {"image": Placeholder(processor.image_token, processor.tokenizer.image_token)}


def _audio_placeholders(processor: ProcessorMixin) -> dict[str, Placeholder]:
    return {"audio": Placeholder(processor.audio_token, processor.audio_token)}


_IDEFICS3 = StockFamily({"image": _rows_and_columns})
_QWEN_VL = StockFamily({"image": _patches}, types="mm_token_type_ids")

STOCK_PROCESSORS: dict[str, StockFamily] = {
    "LlavaProcessor": StockFamily({"image": _one_tile}),
    "LlavaNextProcessor": StockFamily({"image": _tiles_and_sizes}),
    "LlavaOnevisionProcessor": StockFamily({"image": _tiles_and_sizes}, media_by_row=True),
    "Qwen2VLProcessor": _QWEN_VL,
    "Qwen2_5_VLProcessor": _QWEN_VL,
    "Qwen3VLProcessor": _QWEN_VL,
    "InternVLProcessor": StockFamily({"image": _crops}),
    "Idefics3Processor": _IDEFICS3,
    "SmolVLMProcessor": _IDEFICS3,
    "Gemma3Processor": StockFamily({"image": _no_crops}, types="token_type_ids", placeholders=_gemma3_placeholders),
    "Qwen2AudioProcessor": StockFamily({"audio": _mel_frames}, placeholders=_audio_placeholders),
}
"""By the name of the processor's class."""
