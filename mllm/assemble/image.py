"""The image tower of a composition."""

from mllm.assemble.mixed import ReadEncoder, is_mixed, mixed_encoder, seen_size
from mllm.assemble.options import ImageTowerOptions
from mllm.assemble.tiles import check_tiles, tile_rule
from mllm.assemble.tower import Tower
from mllm.errors import CompositionError
from mllm.models import MllmTowerConfig
from mllm.models.connectors import connector_options, written_connector
from mllm.models.encoders import load_encoder, side
from mllm.processing.build import load_image_processor
from mllm.sizes import ImageTokenRule, written_rule

FEATURE_SELECTS = ("default", "full", "patches")


def image_tower(options: ImageTowerOptions, *, text_hidden_size: int) -> Tower:
    """Load an image encoder and describe its tower.

    Raises:
        CompositionError, OptionError: It cannot be read or composed.
    """
    path = options.encoder
    read = _read_one(path, options) if isinstance(path, str) and not is_mixed(path) else _read_several(options)
    _, connector = connector_options(options.connector)
    rule = ImageTokenRule(
        **read.rule,
        connector=connector.length_rule(),
        is_joined=connector.per == "item",
        tiles=tile_rule(options.tiles),
    )
    check_tiles(rule, connector)
    config = MllmTowerConfig(
        encoder_config=read.encoder.config,
        connector=written_connector(options.connector),
        feature_sizes=read.sizes,
        feature_lengths=read.lengths,
        text_hidden_size=text_hidden_size,
        rule=written_rule(rule),
    )
    return Tower(read.encoder, config, read.image_processor)


def _read_several(options: ImageTowerOptions) -> ReadEncoder:
    """Several encoders, see `mllm.assemble.mixed`."""
    if options.feature_select is not None:
        _check_feature_select(options.feature_select)
    alone = isinstance(options.encoder, str)
    read = mixed_encoder(
        [{"encoder": options.encoder, "image_size": options.image_size}] if alone else options.encoder,
        image_size=options.image_size,
        join=options.join,
        feature_layer=options.feature_layer,
        feature_select=options.feature_select,
    )
    tiles = tile_rule(options.tiles)
    if read.lengths and tiles is not None and tiles.order == "rows":
        raise CompositionError(
            f"{len(read.lengths)} streams of features, and tiles that are read as one map",
            expected="one grid of features for such a map",
            do="set `join: channels`, or `order: views` with `separators: none` or `ends` under `tiles`",
        )
    return read


def _read_one(path: str, options: ImageTowerOptions) -> ReadEncoder:
    encoder, num_prefix_tokens = load_encoder(path, feature_layer=options.feature_layer)
    rule = {
        "image_size": seen_size(encoder.config, options.image_size, where=path),
        "patch_size": side(encoder.config.patch_size),
        "num_prefix_tokens": num_prefix_tokens,
        "feature_select": _feature_select(options.feature_select, num_prefix_tokens, encoder.config.model_type),
    }
    return ReadEncoder(encoder, rule, [encoder.config.hidden_size], [], load_image_processor(path))


def _feature_select(choice: str | None, num_prefix_tokens: int, model_type: str) -> str:
    if choice is None:
        return "default" if num_prefix_tokens else "full"
    _check_feature_select(choice)
    if choice == "default" and num_prefix_tokens == 0:
        raise CompositionError(
            f"feature_select = 'default' with {model_type}, which has no class token to drop",
            expected="'full' for an encoder without a class token",
            do="set `feature_select: full`, or leave it out",
        )
    return choice


def _check_feature_select(choice: str) -> None:
    if choice not in FEATURE_SELECTS:
        raise CompositionError(
            f"feature_select = {choice!r}",
            expected=f"one of {', '.join(FEATURE_SELECTS)}",
            do="set `feature_select` to one of them, or leave it out",
        )
