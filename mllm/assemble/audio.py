"""The audio tower of a composition."""

from typing import Any

from transformers import AutoFeatureExtractor

from mllm.assemble.options import AudioTowerOptions
from mllm.assemble.reading import read_config
from mllm.assemble.reuse import TrainedConnector, check_fits, read_connector
from mllm.assemble.tower import Tower
from mllm.errors import CompositionError, OptionError
from mllm.models import MllmTowerConfig
from mllm.models.audio_encoders import audio_encoder_family, encoder_window, load_audio_encoder
from mllm.models.connectors import connector_options, written_connector
from mllm.sizes import written_rule
from mllm.sizes.audio import AudioTokenRule

PUBLISHED = "mlp"
"""The connector where neither one nor a trained one was named."""


def audio_tower(options: AudioTowerOptions, *, text_hidden_size: int) -> Tower:
    """Load an audio encoder and describe its tower.

    Raises:
        CompositionError, OptionError: It cannot be read or composed.
    """
    if options.clips < 0:
        raise OptionError(f"clips = {options.clips}", expected="0 or more", do="correct `audio.clips`")
    audio_encoder_family(read_config(options.encoder, "audio.encoder").model_type, where=options.encoder)
    encoder = load_audio_encoder(options.encoder, feature_layer=options.feature_layer, pool_time=options.pool_time)
    extractor = AutoFeatureExtractor.from_pretrained(options.encoder)
    trained = None if options.connector_from is None else read_connector(options.connector_from)
    written = _connector(options, trained)
    _, connector = connector_options(written)
    window = encoder_window(encoder, extractor, options.window_seconds)
    if options.clips and connector.positions and options.clips > connector.positions:
        raise OptionError(
            f"{options.clips} clips, and a connector with {connector.positions} positions",
            expected="a position for each clip",
            do="raise `positions` of the connector, or lower `clips`",
        )
    rule = AudioTokenRule(
        sampling_rate=extractor.sampling_rate,
        window=window.samples,
        samples_per_step=window.samples_per_step,
        first_step=window.first_step,
        features_per_step=window.features_per_step,
        counts_silence=options.counts_silence,
        connector=connector.length_rule(),
        is_joined=connector.per == "item",
        most_windows=connector.positions or None,
        clips=options.clips,
    )
    config = MllmTowerConfig(
        encoder_config=encoder.config,
        connector=written,
        feature_sizes=[encoder.config.hidden_size],
        text_hidden_size=text_hidden_size,
        rule=written_rule(rule),
    )
    if trained is not None:
        check_fits(trained, feature_sizes=tuple(config.feature_sizes), out_size=text_hidden_size)
    return Tower(encoder, config, extractor, connector_weights=None if trained is None else trained.weights)


def _connector(options: AudioTowerOptions, trained: TrainedConnector | None) -> dict[str, Any]:
    """The connector as it is written: the one that was named, or that of the model it comes from."""
    if trained is None:
        return written_connector(options.connector or PUBLISHED)
    if options.connector is not None and written_connector(options.connector) != trained.written:
        raise CompositionError(
            f"connector = {options.connector!r:.120} beside {trained.where}, which is {trained.written!r:.200}",
            expected="the same type and options, or none",
            do="leave `connector` out",
        )
    return trained.written
