"""The audio encoders that can be composed, one entry each: how they are found, what a window of them is, how read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    ASTModel,
    AudioFlamingo3Encoder,
    ClapAudioModel,
    HubertModel,
    PreTrainedConfig,
    PreTrainedModel,
    Wav2Vec2Model,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import ModelOutput

from mllm.errors import CompositionError
from mllm.shapes import Tensor

AST_FRAME, AST_HOP = 400, 160
"""Samples of a frame of its spectrogram, and from one to the next, as its preprocessing has them."""
FREE_SECONDS = 10.0
"""A window of encoders that read any length."""


@dataclass(frozen=True)
class Window:
    """What an encoder reads at once; the fields are those of `AudioTokenRule`.

    Args:
        samples: How many at most.
        samples_per_step: From one step of features to the next.
        first_step: With how many samples there is a first step.
        features_per_step: How many features each step has.
    """

    samples: int
    samples_per_step: int
    first_step: int = 1
    features_per_step: int = 1


class ClapEncoder(ClapAudioModel):
    """CLAP's audio encoder: it has one attention of its own, whatever the model around it is asked for."""

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """The only one."""
        return "eager"


def _hidden_states(outputs: ModelOutput, config: PreTrainedConfig) -> Tensor:
    return outputs.hidden_states[-1]


def _as_they_are(encoder: PreTrainedModel, samples: int, extractor: Any) -> int:
    return samples


@dataclass(frozen=True)
class AudioEncoderFamily:
    """How one family of audio encoders is found, loaded and read.

    Args:
        kind: The encoder's class.
        window: From its config, its preprocessing, and the samples that were asked for or None: the longest window.
        shape: Of one view, as the encoder takes it, from its config and the samples of a window.
        sub_config: Where the encoder's config stands in a checkpoint that holds more.
        key_mapping: Patterns of a checkpoint's names and what they are in the encoder.
        unexpected_prefixes: Keys of a checkpoint that are not the encoder's and may be left behind.
        overrides: Config fields set at assembly: what would only be carried along, and what would make training
            random (masked features, dropped layers).
        has_layers: Whether features can be taken from below its end.
        last_norm: From its config, the prefix of the norm at its end, which features from below do not pass.
        fixed: Prefixes of tables that stay as they are, as in stock training.
        shortened: Makes an encoder read windows of so many samples at most; gives how many it then reads.
        mask: What the encoder is told of how many samples of each view are sound, from its config, these numbers, the
            views and the samples of a window; None for encoders that take silence as sound.
        read: From its outputs to features that follow one another in time.
    """

    kind: type[PreTrainedModel]
    window: Callable[[PreTrainedConfig, Any, int | None], Window]
    shape: Callable[[PreTrainedConfig, int], tuple[int, ...]]
    sub_config: str | None = None
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    unexpected_prefixes: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    has_layers: bool = True
    last_norm: Callable[[PreTrainedConfig], tuple[str, ...]] = lambda config: ()
    fixed: tuple[str, ...] = ()
    shortened: Callable[[PreTrainedModel, int, Any], int] = _as_they_are
    mask: Callable[[PreTrainedConfig, Tensor, Tensor, int], dict[str, Tensor]] | None = None
    read: Callable[[ModelOutput, PreTrainedConfig], Tensor] = _hidden_states

    def unused(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """Prefixes of parameters that training leaves alone: the features never pass them, or they are fixed."""
        return self.fixed if config.tie_last_hidden_states else (*self.fixed, *self.last_norm(config))


def _check_pitches(config: PreTrainedConfig, found: int) -> None:
    """The spectrogram has as many pitches as the encoder reads.

    Raises:
        CompositionError: It has others.
    """
    if found != config.num_mel_bins:
        raise CompositionError(
            f"preprocessing that gives spectrograms of {found} pitches, and a {config.model_type!r} encoder",
            expected=f"{config.num_mel_bins}, which that encoder reads",
            do="put the preprocessor_config.json of the encoder's own checkpoint beside it",
        )


def _whisper_window(config: PreTrainedConfig, extractor: Any, samples: int | None) -> Window:
    """Its table of positions decides: 1,500 features of 30 seconds for every published one."""
    _check_pitches(config, extractor.feature_size)
    step = 2 * extractor.hop_length
    return Window(config.max_source_positions * step, step)


def _pooled_window(config: PreTrainedConfig, extractor: Any, samples: int | None) -> Window:
    _check_pitches(config, extractor.feature_size)
    step = 2 * extractor.hop_length
    return Window(config.max_source_positions * step, 2 * step, step + 1)


def _cut_positions(encoder: PreTrainedModel, samples: int, extractor: Any) -> int:
    """Let a Whisper encoder read less: positions behind the window's end are left out of its table, in pairs."""
    step = 2 * extractor.hop_length
    places = min(2 * -(-samples // (2 * step)), encoder.config.max_source_positions)
    weight = encoder.embed_positions.weight.detach()[:places].clone()
    encoder.embed_positions = nn.Embedding.from_pretrained(weight, freeze=True)
    encoder.config.max_source_positions = encoder.max_source_positions = places
    return places * step


def _whisper_shape(config: PreTrainedConfig, window: int) -> tuple[int, ...]:
    return config.num_mel_bins, 2 * config.max_source_positions


def _sounding(samples: Tensor, values: Tensor, window: int) -> Tensor:
    """Which of the last axis of views is sound, that axis standing for the samples of a window."""
    places = torch.arange(values.shape[-1], device=values.device) * (window // values.shape[-1])
    return places < samples[:, None]


def _mel_mask(config: PreTrainedConfig, samples: Tensor, values: Tensor, window: int) -> dict[str, Tensor]:
    return {"input_features_mask": _sounding(samples, values, window)}


def _wave_mask(config: PreTrainedConfig, samples: Tensor, values: Tensor, window: int) -> dict[str, Tensor]:
    """Only those with layer norm at their beginning were trained with masks; stock code says the same."""
    if config.feat_extract_norm != "layer":
        return {}
    first, _ = _convolutions(config)
    return {"attention_mask": _sounding(samples.clamp(min=first), values, window)}


def _convolutions(config: PreTrainedConfig) -> tuple[int, int]:
    """The samples that a feature sees, and from one to the next."""
    seen, step = 1, 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        seen += (kernel - 1) * step
        step *= stride
    return seen, step


def _wave_window(config: PreTrainedConfig, extractor: Any, samples: int | None) -> Window:
    """Any length."""
    first, step = _convolutions(config)
    return Window(samples or round(FREE_SECONDS * extractor.sampling_rate), step, first)


def _wave_norm(config: PreTrainedConfig) -> tuple[str, ...]:
    """The large ones have it behind the layers, the others before them."""
    return ("encoder.layer_norm",) if config.do_stable_layer_norm else ()


def _ast_window(config: PreTrainedConfig, extractor: Any, samples: int | None) -> Window:
    """Its table of positions decides: 1,024 frames, in columns of patches, for every published one."""
    _check_pitches(config, extractor.num_mel_bins)
    step, rows = config.time_stride * AST_HOP, (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    return Window(config.max_length * AST_HOP, step, AST_FRAME + (config.patch_size - 1) * AST_HOP, rows)


def _ast_features(outputs: ModelOutput, config: PreTrainedConfig) -> Tensor:
    """Its patches stand in rows of one pitch behind two tokens; here those of one moment follow one another."""
    patches = outputs.hidden_states[-1][:, 2:]
    rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    return patches.unflatten(1, (rows, -1)).transpose(1, 2).flatten(1, 2)


def _clap_grid(config: PreTrainedConfig) -> tuple[int, int]:
    """Steps in time, and features of each: its spectrogram is folded into a square, and unfolded at the end."""
    fold = config.spec_size // config.num_mel_bins
    stride = config.patch_stride if isinstance(config.patch_stride, int) else config.patch_stride[0]
    side = config.spec_size // 2 ** (len(config.depths) - 1) // stride
    return side * fold, side // fold


def _clap_window(config: PreTrainedConfig, extractor: Any, samples: int | None) -> Window:
    """Ten seconds; what is shorter its preprocessing repeats, and the repetitions do not count."""
    _check_pitches(config, extractor.feature_size)
    steps, features = _clap_grid(config)
    return Window(extractor.nb_max_samples, -(-extractor.nb_max_samples // steps), 1, features)


def _clap_shape(config: PreTrainedConfig, window: int) -> tuple[int, ...]:
    return 1, config.spec_size * (config.spec_size // config.num_mel_bins), config.num_mel_bins


def _clap_features(outputs: ModelOutput, config: PreTrainedConfig) -> Tensor:
    """From [N, D, pitches, steps]; its hidden states are still folded."""
    return outputs.last_hidden_state.permute(0, 3, 2, 1).flatten(1, 2)


_NOT_RANDOM = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}
_WAVE_HEADS = ("lm_head.", "quantizer.", "project_", "projector.", "classifier.", "adapter.", "masked_spec_embed")
_CLAP = AudioEncoderFamily(
    kind=ClapEncoder,
    window=_clap_window,
    shape=_clap_shape,
    sub_config="audio_config",
    key_mapping={r"^audio_model\.": ""},
    unexpected_prefixes=(
        *("text_model.", "logit_scale", "text_projection.", "audio_projection."),
        *("audio_encoder.patch_embed.fusion_model.", "audio_encoder.patch_embed.mel_conv2d."),
    ),
    # Fusion is how it reads more than ten seconds at once; here they are windows.
    overrides={"enable_fusion": False},
    has_layers=False,
    read=_clap_features,
)
AUDIO_ENCODERS: dict[str, AudioEncoderFamily] = {
    "whisper": AudioEncoderFamily(
        kind=WhisperEncoder,
        window=_whisper_window,
        shape=_whisper_shape,
        key_mapping={r"^(model\.)?encoder\.": ""},
        unexpected_prefixes=("model.decoder.", "decoder.", "proj_out.", "projector.", "classifier.", "layer_weights"),
        overrides={"encoder_layerdrop": 0.0},
        last_norm=lambda config: ("layer_norm",),
        fixed=("embed_positions",),
        shortened=_cut_positions,
    ),
    "audioflamingo3_encoder": AudioEncoderFamily(
        kind=AudioFlamingo3Encoder,
        window=_pooled_window,
        shape=_whisper_shape,
        overrides={"layerdrop": 0.0},
        has_layers=False,
        fixed=("embed_positions",),
        shortened=_cut_positions,
        mask=_mel_mask,
    ),
    "audio-spectrogram-transformer": AudioEncoderFamily(
        kind=ASTModel,
        window=_ast_window,
        shape=lambda config, window: (config.max_length, config.num_mel_bins),
        unexpected_prefixes=("classifier.",),
        last_norm=lambda config: ("layernorm",),
        read=_ast_features,
    ),
    "wav2vec2": AudioEncoderFamily(
        kind=Wav2Vec2Model,
        window=_wave_window,
        shape=lambda config, window: (window,),
        unexpected_prefixes=(*_WAVE_HEADS, "wav2vec2.adapter.", "wav2vec2.masked_spec_embed"),
        overrides=_NOT_RANDOM | {"add_adapter": False},
        last_norm=_wave_norm,
        mask=_wave_mask,
    ),
    "hubert": AudioEncoderFamily(
        kind=HubertModel,
        window=_wave_window,
        shape=lambda config, window: (window,),
        unexpected_prefixes=(*_WAVE_HEADS, "hubert.masked_spec_embed"),
        overrides=_NOT_RANDOM,
        last_norm=_wave_norm,
        mask=_wave_mask,
    ),
    "clap": _CLAP,
    "clap_audio_model": _CLAP,
}
