"""Several image encoders in one tower: which there are, and how each sees the same pixels."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from mllm.assemble.reading import read_config
from mllm.errors import CompositionError, OptionError
from mllm.models import MixedEncoder, MixedEncoderConfig
from mllm.models.encoders import ENCODERS, encoder_family, feature_width, grid_side, load_encoder, side
from mllm.models.mixed_configuration import ENCODER_NAMES
from mllm.models.query_encoder import load_query_encoder
from mllm.processing.build import load_image_processor

Encoders = str | Sequence[Any]
"""One encoder's directory or Hub id; or a list of several, see `MixedPartOptions`."""
JOINS = ("channels", "sequence")


@dataclass(frozen=True)
class MixedPartOptions:
    """One of several image encoders; where it has no options of its own, its directory or Hub id alone is enough.

    Args:
        encoder: Directory or Hub id.
        feature_layer: As the tower's, which is taken where this is absent; of a ConvNeXt a layer is a stage.
        image_size: Side of the square that it sees, for encoders that read any: ConvNeXt and DINO; by default what
            their configurations say, which is 518 for the published DINOv2.
        queries: Of a BLIP-2 checkpoint, whether its Q-Former's output are the features, as in SPHINX and Video-LLaMA,
            in place of its image encoder's patches.
    """

    encoder: str
    feature_layer: int | None = None
    image_size: int | None = None
    queries: bool = False


class ReadEncoder(NamedTuple):
    """An image encoder, and what a tower's configuration says of it.

    Args:
        encoder: Loaded.
        rule: Fields of its `ImageTokenRule`.
        sizes: Widths of its streams of features.
        lengths: Features of each stream, where there are several.
        image_processor: Decides colours and filter.
    """

    encoder: PreTrainedModel
    rule: dict[str, Any]
    sizes: list[int]
    lengths: list[int]
    image_processor: BaseImageProcessor


class _Part(NamedTuple):
    """One encoder, with what it makes of an image: a grid of this side, or so many queries."""

    encoder: PreTrainedModel
    image_size: int
    side: int | None
    num_queries: int
    width: int
    image_processor: BaseImageProcessor


def is_mixed(path: str) -> bool:
    """Whether one encoder has to be read as several are: it gives no tokens.

    Raises:
        CompositionError: It cannot be read, or is of no family in the table.
    """
    model_type = read_config(path, "image.encoder").model_type
    return encoder_family(model_type, where=path).features == "map"


def encoder_paths(encoder: Encoders) -> list[str]:
    """The directories and Hub ids in a choice of encoders.

    Raises:
        OptionError: An entry is malformed.
    """
    entries = [encoder] if isinstance(encoder, str) else encoder
    return [one.encoder for entry in entries for one in _parts_of_stream(entry)]


def streams_of(choice: Encoders, join: str) -> list[list[MixedPartOptions]]:
    """The encoders of each stream of features.

    Raises:
        OptionError: There are too many, an entry is malformed, or `join` has no such value.
    """
    if join not in JOINS:
        raise OptionError(f"image: join = {join!r}", expected=f"one of {', '.join(JOINS)}", do="choose one")
    entries = [choice] if isinstance(choice, str) else list(choice)
    streams = [_parts_of_stream(entry) for entry in entries]
    count = sum(len(stream) for stream in streams)
    if not 1 <= count <= len(ENCODER_NAMES):
        raise OptionError(
            f"image: {count} encoders",
            expected=f"1 to {len(ENCODER_NAMES)}",
            do="leave the others out" if count else "name at least one",
        )
    if join == "sequence":
        return streams
    if any(_is_list(entry) for entry in entries):
        raise OptionError(
            "image: encoder: a list in the list of encoders, and join = 'channels'",
            expected="encoders alone: all of them are joined by channels",
            do="set `join: sequence`, which makes a stream of each entry, or take the inner brackets away",
        )
    return [[one for stream in streams for one in stream]]


def seen_size(config: PreTrainedConfig, wanted: int | None, *, where: str) -> int:
    """Side of the square that an encoder sees: as its configuration has it, or as wanted.

    Raises:
        CompositionError: It reads no other than its own.
    """
    own = side(config.image_size)
    if wanted not in (None, own) and not ENCODERS[config.model_type].is_resizable:
        raise CompositionError(
            f"image_size = {wanted} for {where}, a {config.model_type!r} model made for {own} pixels",
            expected="that size: its table of positions is made for it",
            do="leave `image_size` out; what one of several encoders sees is made that large for it",
        )
    return own if wanted is None else wanted


def mixed_encoder(
    choice: Encoders, *, join: str, feature_layer: int, feature_select: str | None, image_size: int | None = None
) -> ReadEncoder:
    """Load several image encoders and describe what they make of an image together.

    Args:
        choice: Up to four. Under `join: sequence` an entry may be a list, whose encoders are joined by channels.
        join: "channels" brings all grids to the largest one and puts the channels of a cell behind one another;
            "sequence" keeps each entry's features as a stream of its own.
        feature_layer: Of encoders that do not state their own.
        feature_select: "full" puts a class token in front of each grid, the grid's mean where an encoder has none;
            else patches alone.
        image_size: Side of the square that an image is brought to before each encoder sees it in its own size; by
            default the largest of those.

    Raises:
        CompositionError, OptionError: They cannot be read or joined.
    """
    streams = streams_of(choice, join)
    parts = [_load(one, feature_layer) for stream in streams for one in stream]
    numbers = iter(range(len(parts)))
    described = [_describe([next(numbers) for _ in stream], parts, feature_select) for stream in streams]
    config = MixedEncoderConfig(
        **{f"{name}_config": part.encoder.config for name, part in zip(ENCODER_NAMES, parts, strict=False)},
        readings=[
            {"image_size": part.image_size, **_colours(part.image_processor, parts[0].image_processor)}
            for part in parts
        ],
        streams=described,
        image_size=image_size or max(part.image_size for part in parts),
    )
    lengths = [_length(stream, parts) for stream in described]
    first_side = described[0]["side"] or 1
    rule = {
        "image_size": config.image_size,
        "patch_size": max(1, config.image_size // first_side),
        "num_prefix_tokens": 0,
        "feature_select": "full",
        "num_features": sum(lengths),
    }
    widths = [sum(parts[number].width for number in stream["encoders"]) for stream in described]
    several = lengths if len(lengths) > 1 else []
    return ReadEncoder(_mixed(config, parts), rule, widths, several, parts[0].image_processor)


def _is_list(entry: Any) -> bool:
    return isinstance(entry, Sequence) and not isinstance(entry, str)


def _parts_of_stream(entry: Any) -> list[MixedPartOptions]:
    """An entry of the list of encoders: one, or several that are joined by channels."""
    return [_part_options(one) for one in entry] if _is_list(entry) else [_part_options(entry)]


def _part_options(given: Any) -> MixedPartOptions:
    if isinstance(given, str):
        return MixedPartOptions(given)
    known = [field.name for field in dataclasses.fields(MixedPartOptions)]
    if not isinstance(given, Mapping) or not isinstance(given.get("encoder"), str) or set(given) - set(known):
        raise OptionError(
            f"image: encoder: {given!r} among several encoders",
            expected=f"a directory, a Hub id, or a mapping with `encoder` and what differs of {', '.join(known[1:])}",
            do="correct that entry",
        )
    return MixedPartOptions(**given)


def _load(options: MixedPartOptions, feature_layer: int) -> _Part:
    path = options.encoder
    config = read_config(path, "image.encoder")
    if options.queries:
        return _load_queries(options)
    encoder_family(config.model_type, where=path)
    layer = feature_layer if options.feature_layer is None else options.feature_layer
    encoder, _ = load_encoder(path, feature_layer=layer)
    image_size = seen_size(encoder.config, options.image_size, where=path)
    grid = grid_side(encoder.config, image_size)
    if grid == 0:
        raise CompositionError(
            f"image_size = {image_size} for {path}, of which not one cell of a grid is left",
            expected="at least as many pixels as a cell covers",
            do="raise `image_size`, or take features of an earlier layer",
        )
    processor = load_image_processor(path)
    return _Part(encoder, image_size, grid, 0, feature_width(encoder.config), processor)


def _load_queries(options: MixedPartOptions) -> _Part:
    if options.feature_layer is not None or options.image_size is not None:
        raise OptionError(
            f"image: encoder: {options.encoder}: queries, with a feature_layer or an image_size",
            expected="neither: its Q-Former reads the last layer of images of its own size",
            do="leave them out",
        )
    encoder = load_query_encoder(options.encoder)
    config, processor = encoder.config, load_image_processor(options.encoder)
    return _Part(encoder, config.image_size, None, config.num_query_tokens, feature_width(config), processor)


def _describe(numbers: list[int], parts: Sequence[_Part], feature_select: str | None) -> dict[str, Any]:
    """One entry of `MixedEncoderConfig.streams`."""
    sides = [parts[number].side for number in numbers]
    if len(numbers) > 1 and None in sides:
        path = parts[numbers[sides.index(None)]].encoder.name_or_path
        raise CompositionError(
            f"{path}, whose features are no grid, joined by channels",
            expected="encoders with a grid of patches: a cell of one is joined with a cell of the other",
            do="set `join: sequence`, and let it be an entry of its own",
        )
    largest = max((one for one in sides if one is not None), default=None)
    has_class_token = feature_select == "full" and largest is not None
    return {"encoders": numbers, "side": largest, "has_class_token": has_class_token}


def _length(stream: Mapping[str, Any], parts: Sequence[_Part]) -> int:
    if stream["side"] is None:
        return parts[stream["encoders"][0]].num_queries
    return stream["side"] ** 2 + stream["has_class_token"]


def _colours(own: BaseImageProcessor, first: BaseImageProcessor) -> dict[str, list[float]]:
    """What turns pixels as the first encoder's preprocessing leaves them into those of another's.

    Preprocessing is affine: pixel * factor = value * std + mean.
    """
    (own_factor, own_mean, own_std), (factor, mean, std) = _affine(own), _affine(first)
    ratio = own_factor / factor
    scale = [ratio * before / after for before, after in zip(std, own_std, strict=True)]
    shift = [
        (ratio * before - after) / divisor for before, after, divisor in zip(mean, own_mean, own_std, strict=True)
    ]
    return {"scale": scale, "shift": shift}


def _affine(processor: BaseImageProcessor) -> tuple[float, list[float], list[float]]:
    factor = 1.0
    if processor.do_rescale:
        factor = 1 / 255 if processor.rescale_factor is None else processor.rescale_factor
    if not processor.do_normalize:
        return factor, [0.0] * 3, [1.0] * 3
    return factor, list(processor.image_mean), list(processor.image_std)


def _mixed(config: MixedEncoderConfig, parts: Sequence[_Part]) -> MixedEncoder:
    """Loaded encoders in a shell that took no memory."""
    with torch.device("meta"):
        mixed = MixedEncoder(config)
    for name, part in zip(ENCODER_NAMES, parts, strict=False):
        setattr(mixed, name, part.encoder)
    return mixed.eval()
