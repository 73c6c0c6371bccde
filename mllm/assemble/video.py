"""The video tower of a composition."""

from collections.abc import Mapping
from typing import Any

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


def asked_of_frames(questions: Mapping[str, Any], *, video: Tower | None) -> dict[str, Any]:
    """What `question_options` gave, with the questions of videos whose frames pass an image connector that reads them.

    Args:
        questions: For `build_processor`.
        video: The video tower; None for none.
    """
    tokens = dict(questions.get("question_tokens") or {})
    if video is not None and video.config.through_image_connector and "image" in tokens:
        tokens["video"] = min(tokens["image"], tokens.get("video", tokens["image"]))
    return {**questions, "question_tokens": tokens} if tokens else dict(questions)


def _check_rule(rule: VideoTokenRule) -> None:
    """Refuse what no video would fit: too few positions, or no grid of features for a connector that needs one."""
    if rule.most_frames is not None and rule.choice.rule in FIXED and rule.choice.frames > rule.most_frames:
        raise CompositionError(
            f"video.frames = {rule.sampling!r}, and a connector with {rule.most_frames} positions",
            expected="a position for each frame: every video would be refused",
            do=f"set `positions: {rule.choice.frames}` for the connector, or sample at most {rule.most_frames} frames",
        )
    if not rule.is_joined:
        rule.connector.count(rule.features)
