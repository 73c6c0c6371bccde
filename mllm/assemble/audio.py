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
from mllm.models.audio_families import Window
from mllm.models.connectors import ConnectorOptions, connector_options, written_connector
from mllm.processing.sounds import check_extractor
from mllm.sizes import written_rule
from mllm.sizes.audio import AudioTokenRule

DEFAULT_CONNECTOR = "mlp"
"""Where none was named, and no trained one."""


def audio_tower(options: AudioTowerOptions, *, text_hidden_size: int) -> Tower:
    """Load an audio encoder and describe its tower.

    Raises:
        CompositionError, OptionError: It cannot be read or composed.
    """
    audio_encoder_family(read_config(options.encoder, "audio.encoder").model_type, where=options.encoder)
    encoder = load_audio_encoder(options.encoder, feature_layer=options.feature_layer, pool_time=options.pool_time)
    extractor = _extractor(options.encoder)
    trained = None if options.connector_from is None else read_connector(options.connector_from)
    written = _connector(options, trained)
    window = encoder_window(encoder, extractor, options.window_seconds)
    rule = _rule(options, window, connector_options(written)[1], sampling_rate=extractor.sampling_rate)
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


def _rule(
    options: AudioTowerOptions, window: Window, connector: ConnectorOptions, *, sampling_rate: int
) -> AudioTokenRule:
    """How many tokens a sound becomes.

    Raises:
        OptionError: So many clips there cannot be.
        CompositionError: The connector wants a grid.
    """
    if not 0 <= options.clips <= (connector.positions or options.clips):
        raise OptionError(
            f"{options.clips} clips, and a connector with {connector.positions} positions",
            expected="0 or more, and a position for each clip",
            do="raise `positions` of the connector, or correct `clips`",
        )
    if connector.length_rule().kind == "grid":
        raise CompositionError(
            f"a connector for features on a square grid ({type(connector).__name__}), and sounds",
            expected="one for features that follow one another: `mlp`, `pool`, `frame_stack`, a Q-Former, ...",
            do="choose another, or `over: sequence` where it has that",
        )
    return AudioTokenRule(
        sampling_rate=sampling_rate,
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


def _extractor(path: str) -> Any:
    """The preprocessing of sounds in a checkpoint.

    Raises:
        CompositionError: There is none.
        OptionError: It is of a kind that we do not know.
    """
    try:
        extractor = AutoFeatureExtractor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CompositionError(
            f"audio.encoder = {path!r} has no preprocessing of sounds: {str(error).splitlines()[0]}",
            expected="a preprocessor_config.json beside its weights",
            do="put that of the encoder's published checkpoint there",
        ) from error
    check_extractor(extractor)
    return extractor


def _connector(options: AudioTowerOptions, trained: TrainedConnector | None) -> dict[str, Any]:
    """The connector as it is written: the one that was named, or that of the model it comes from."""
    if trained is None:
        return written_connector(options.connector or DEFAULT_CONNECTOR)
    if options.connector is not None and written_connector(options.connector) != trained.written:
        raise CompositionError(
            f"connector = {options.connector!r:.120} beside {trained.where}, which is {trained.written!r:.200}",
            expected="the same type and options, or none",
            do="leave `connector` out",
        )
    return trained.written
