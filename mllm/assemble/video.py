"""The video tower of a composition."""

from mllm.assemble.options import VideoTowerOptions
from mllm.assemble.tower import Tower
from mllm.errors import CompositionError
from mllm.models import MllmTowerConfig
from mllm.models.connectors import connector_options, written_connector
from mllm.sizes import written_rule
from mllm.sizes.video import VideoTokenRule

FIXED = ("uniform", "segment")
"""Rules of sampling that take as many frames of every video."""


def video_tower(options: VideoTowerOptions, *, text_hidden_size: int, image: Tower | None) -> Tower:
    """Describe a video tower, whose frames the image tower's encoder reads.

    Raises:
        CompositionError, OptionError: There is no image tower, or the options do not fit each other.
    """
    if image is None:
        raise CompositionError(
            "a video tower without an image tower",
            expected="an image encoder, which sees the frames",
            do="add `image: {encoder: ...}` under `model`",
        )
    _, connector = connector_options(options.connector)
    if options.timestamps and connector.per == "item":
        raise CompositionError(
            "timestamps, and a connector that reads all frames as one sequence",
            expected="a connector that reads frame by frame, so that each can stand behind its time",
            do="set `per: view` for the connector, or leave `timestamps` out",
        )
    features = image.config.media_rule.views((1, 1))[0]
    if options.through_image_connector:
        features = image.config.media_rule.connector.count(features)
    rule = VideoTokenRule(
        sampling=options.frames,
        features=features,
        connector=connector.length_rule(),
        is_joined=connector.per == "item",
        most_frames=connector.positions or None,
        has_timestamps=options.timestamps,
    )
    _check_rule(rule)
    config = MllmTowerConfig(
        encoder_config=None,
        connector=written_connector(options.connector),
        feature_sizes=[text_hidden_size] if options.through_image_connector else image.config.feature_sizes,
        feature_lengths=[] if options.through_image_connector else image.config.feature_lengths,
        text_hidden_size=text_hidden_size,
        through_image_connector=options.through_image_connector,
        rule=written_rule(rule),
    )
    return Tower(None, config, None)


def _check_rule(rule: VideoTokenRule) -> None:
    """Refuse what no video would fit: too few positions, or a grid made of many frames."""
    if rule.most_frames is not None and rule.choice.rule in FIXED and rule.choice.frames > rule.most_frames:
        raise CompositionError(
            f"video.frames = {rule.sampling!r}, and a connector with {rule.most_frames} positions",
            expected="a position for each frame: every video would be refused",
            do=f"set `positions: {rule.choice.frames}` for the connector, or sample at most {rule.most_frames} frames",
        )
    if rule.is_joined and rule.connector.kind == "grid":
        raise CompositionError(
            "a connector that joins neighbours on a grid, and all frames of a video as one sequence",
            expected="one grid at a time",
            do="set `per: view` for the connector, or choose one that needs no grid",
        )
    if not rule.is_joined:
        rule.connector.count(rule.features)  # a grid that is no square is named now
