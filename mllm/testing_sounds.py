"""Tiny random audio encoders as downloads look, and rows about short sounds, for tests and scripts."""

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    ASTFeatureExtractor,
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    ClapFeatureExtractor,
    ClapModel,
    FeatureExtractionMixin,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

RATE = 16_000
AUDIO_FAMILIES = ("whisper", "audio-spectrogram-transformer", "wav2vec2", "wav2vec2-layer", "hubert", "clap")
"""Of `tiny_audio_model`; "wav2vec2-layer" has the layer norms of the large ones, and masks."""

_LAYERS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_WAVE = {**_LAYERS, "vocab_size": 8, "conv_dim": (8, 8, 8), "conv_kernel": (10, 3, 3), "conv_stride": (5, 4, 4)}
_WAVE |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}


def tiny_audio_model(family: str = "whisper") -> tuple[PreTrainedModel, FeatureExtractionMixin]:
    """A random model of which an audio encoder of one of these families is part, and its preprocessing.

    Whisper, AST and CLAP read windows of about a second: 50, 27 and 64 features of them.
    """
    torch.manual_seed(4)
    if family == "whisper":
        extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
        return WhisperForConditionalGeneration(_whisper_config()).eval(), extractor
    if family == "audio-spectrogram-transformer":
        config = AutoConfig.for_model(family, **_LAYERS, max_length=104, num_mel_bins=36)
        extractor = ASTFeatureExtractor(num_mel_bins=36, max_length=104)
        model = AutoModelForAudioClassification.from_config(config).eval()
        # At zero, as they begin, positions are not seen.
        torch.nn.init.normal_(model.base_model.embeddings.position_embeddings, std=0.02)
        return model, extractor
    if family == "clap":
        return _clap()
    fields: dict[str, Any] = dict(_WAVE)
    if family == "wav2vec2-layer":
        fields |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    config = AutoConfig.for_model(family.removesuffix("-layer"), **fields)
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=family == "wav2vec2-layer")
    return AutoModelForCTC.from_config(config).eval(), extractor


def save_tiny_audio_encoder(directory: Path, family: str = "whisper") -> str:
    """Save `tiny_audio_model` as a download looks, and return its directory for `assemble`."""
    model, extractor = tiny_audio_model(family)
    model.save_pretrained(directory)
    extractor.save_pretrained(directory)
    return str(directory)


def sine(seconds: float, *, pitch: float = 440.0, rate: int = RATE) -> np.ndarray:
    """A tone."""
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, *, rate: int = RATE) -> Path:
    """A WAV file of 16 bits; samples of several channels are [samples, channels]."""
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1 if samples.ndim == 1 else samples.shape[1], 2, rate, 0, "NONE", ""))
        sound.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def save_tiny_sounds(
    directory: Path,
    count: int = 8,
    *,
    num_sounds: Callable[[int], int] = lambda number: int(number % 3 > 0),
    seconds: Callable[[int], float] = lambda number: 0.3 + 0.4 * (number % 5),
) -> Path:
    """Write rows about tones, with answers of unequal length, and return their JSONL file.

    Args:
        directory: Where `rows.jsonl` and `sounds` are made.
        count: How many rows.
        num_sounds: How many sounds the row of this number has; by default every third row is text alone.
        seconds: How long the sounds of the row of this number are.
    """
    (directory / "sounds").mkdir(parents=True)
    rows = []
    for number in range(count):
        media = []
        for item in range(num_sounds(number)):
            name = f"sounds/{number}-{item}.wav"
            write_wav(directory / name, sine(seconds(number), pitch=300.0 + 40 * number + 25 * item))
            media.append({"kind": "audio", "path": name, "seconds": round(seconds(number) * RATE) / RATE})
        content: list[dict] = [{"type": "audio"}] * len(media)
        question = {"role": "user", "content": [*content, {"type": "text", "text": f"What is number {number}?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a red 3" + " and a 7" * (number % 5)}]}
        rows.append({"id": f"sound-{number}", "source": "tiny", "messages": [question, answer], "media": media})
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _whisper_config() -> Any:
    return AutoConfig.for_model(
        "whisper",
        vocab_size=64,
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=32,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )


def _clap() -> tuple[PreTrainedModel, FeatureExtractionMixin]:
    audio = {"spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1]}
    audio |= {"num_attention_heads": [2, 2], "window_size": 4, "enable_fusion": True, "fusion_type": "aff_2d"}
    text = {**_LAYERS, "num_hidden_layers": 1, "vocab_size": 8, "max_position_embeddings": 16}
    config = AutoConfig.for_model("clap", audio_config=audio, text_config=text, projection_dim=16)
    extractor = ClapFeatureExtractor(
        feature_size=16, sampling_rate=RATE, hop_length=100, max_length_s=1, fft_window_size=512, frequency_max=8000
    )
    return ClapModel(config).eval(), extractor
