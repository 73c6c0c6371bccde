"""Audio encoders: loaded out of checkpoints, cut to a window, and read in order of time."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AudioFlamingo3EncoderConfig, AutoConfig, PreTrainedConfig, PreTrainedModel

from mllm.errors import CompositionError, OptionError
from mllm.models.audio_families import AUDIO_ENCODERS, AudioEncoderFamily, Window
from mllm.models.encoder_checkpoints import layers_needed, load_part
from mllm.shapes import EncoderFeatures, Int, MediaValues, Tensor
from mllm.sizes.audio import AudioTokenRule

_POOLED_FIELDS = (
    *("num_mel_bins", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_source_positions"),
    *("activation_function", "dropout", "attention_dropout", "activation_dropout", "scale_embedding"),
)


def audio_encoder_family(model_type: str, *, where: str) -> AudioEncoderFamily:
    """Look an audio encoder family up by transformers' model type.

    Raises:
        CompositionError: The family is not in the table.
    """
    if model_type in AUDIO_ENCODERS:
        return AUDIO_ENCODERS[model_type]
    raise CompositionError(
        f"{where} is a {model_type!r} model",
        expected=f"an audio encoder of one of these types: {', '.join(AUDIO_ENCODERS)}",
        do="name another checkpoint as `audio.encoder`",
    )


def load_audio_encoder(path: str, *, feature_layer: int, pool_time: bool = False) -> PreTrainedModel:
    """Load the encoder out of a checkpoint and keep only the layers its features come from.

    Args:
        path: Directory or Hub id of an encoder or of the model that holds it.
        feature_layer: -1 for what the encoder gives out, its last norm included; another index into `hidden_states`
            for what that layer gives, without that norm.
        pool_time: Load a Whisper encoder into the class of AudioFlamingo3, which averages every two features before
            the last norm and attends to no silence behind a sound's end.

    Returns:
        The encoder, whose `hidden_states[-1]` are now the features.

    Raises:
        CompositionError: Not an encoder we know, no such layer, or keys missing or left over.
    """
    config = AutoConfig.from_pretrained(path)
    source = family = audio_encoder_family(config.model_type, where=path)
    if family.sub_config and hasattr(config, family.sub_config):
        config = getattr(config, family.sub_config)
    if pool_time:
        family, config = AUDIO_ENCODERS["audioflamingo3_encoder"], _pooled(config, path)
    config = copy.deepcopy(config)
    if not family.has_layers and feature_layer != -1:
        raise CompositionError(
            f"feature_layer = {feature_layer} for a {config.model_type!r} encoder",
            expected="-1: its features are what comes out at its end",
            do="leave `feature_layer` out",
        )
    if family.has_layers:
        config.num_hidden_layers = layers_needed(config.num_hidden_layers, feature_layer, path)
    for name, value in family.overrides.items():
        setattr(config, name, value)
    # transformers asks the config whether the last of the hidden states is what came out at the end.
    config.tie_last_hidden_states = feature_layer == -1
    return load_part(
        family.kind,
        path,
        config=config,
        unexpected_prefixes=source.unexpected_prefixes,
        key_mapping=source.key_mapping,
    )


def encoder_window(encoder: PreTrainedModel, extractor: Any, seconds: float | int | None) -> Window:
    """What an encoder reads at once: as much as it was made for, or less, to which it is then cut.

    Raises:
        OptionError: It cannot read so much, or makes no feature of so little.
    """
    config = encoder.config
    family = AUDIO_ENCODERS[config.model_type]
    wanted = None if seconds is None else round(seconds * extractor.sampling_rate)
    own = family.window(config, extractor, wanted)
    if wanted is None:
        return own
    if not own.first_step <= wanted <= own.samples:
        raise OptionError(
            f"window_seconds = {seconds:g} for a {config.model_type!r} encoder",
            expected=f"{own.first_step / extractor.sampling_rate:.3g} to {own.samples / extractor.sampling_rate:g}",
            do="correct `window_seconds`, or leave it out",
        )
    samples = family.shortened(encoder, wanted, extractor)
    return Window(samples, own.samples_per_step, own.first_step, own.features_per_step)


def audio_features(
    encoder: nn.Module, values: MediaValues, *, rule: AudioTokenRule, samples: Int[Tensor, " views"] | None
) -> EncoderFeatures:
    """What an audio encoder makes of views, in order of time.

    Args:
        encoder: Of a family in the table, perhaps inside of what an adapter wraps it in.
        values: The views.
        rule: Of the tower; it says how many features of a whole window there are.
        samples: Of each view, those that are sound; None for all.
    """
    family = AUDIO_ENCODERS[encoder.config.model_type]
    told = {}
    if family.mask is not None:
        samples = torch.full((len(values),), rule.window, device=values.device) if samples is None else samples
        told = family.mask(encoder.config, samples.to(values.device), values, rule.window)
    outputs = encoder(values, output_hidden_states=True, **told)
    return family.read(outputs, encoder.config)[:, : rule.features]


def _pooled(config: PreTrainedConfig, path: str) -> AudioFlamingo3EncoderConfig:
    """A Whisper encoder's config as AudioFlamingo3 writes it."""
    if config.model_type != "whisper":
        raise CompositionError(
            f"pool_time with {path}, a {config.model_type!r} encoder",
            expected="a Whisper encoder: AudioFlamingo3 and Qwen2-Audio pool those",
            do="leave `pool_time` out, and let the connector pool (`connector: {type: pool, ...}`)",
        )
    fields = {name: getattr(config, name) for name in _POOLED_FIELDS}
    return AudioFlamingo3EncoderConfig(intermediate_size=config.encoder_ffn_dim, **fields)
