"""The layouts of released audio models, put together from our parts: the same tokens and logits, in float32."""

import pytest
import torch
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)

from mllm.models import MllmForConditionalGeneration
from mllm.processing import MllmProcessor
from mllm.processing.media import MediaInput
from mllm.processing.sounds import split_windows
from mllm.testing import tiny_model
from mllm.testing_sounds import RATE, sine

WINDOW = 0.96
"""Seconds: 48 features of the tiny Whisper, which four divides."""
SECONDS = (WINDOW, 0.5, 0.33, 2.3)

AUDIO = {
    "audioflamingo3": {"connector": "mlp", "pool_time": True},
    "qwen2_audio": {"connector": "linear", "pool_time": True},
    "voxtral": {"connector": {"type": "frame_stack", "size": 4}, "counts_silence": True},
}
PROJECTORS = {
    "audioflamingo3": {"linear_1": "linear_1", "linear_2": "linear_2"},
    "qwen2_audio": {"linear": "linear"},
    "voxtral": {"linear_1": "linear_1", "linear_2": "linear_2"},
}


@pytest.fixture(scope="module", params=sorted(AUDIO))
def layout(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def composed(layout, tmp_path_factory) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    return tiny_model(tmp_path_factory.mktemp(layout), audio={"window_seconds": WINDOW, **AUDIO[layout]})


@pytest.fixture(scope="module")
def stock(layout, composed) -> PreTrainedModel:
    """The released model's class, with our weights under its names."""
    model, _ = composed
    encoder, text = model.model.audio_tower.encoder.config, model.config.text_config
    audio = {name: getattr(encoder, name) for name in ("num_mel_bins", "max_source_positions")}
    wide = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    names = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    token = {"audio_token_id": model.config.audio_token_id}
    if layout == "audioflamingo3":
        config = AudioFlamingo3Config(audio_config=audio | wide, text_config=text.to_dict(), **token)
        built = AudioFlamingo3ForConditionalGeneration(config)
    elif layout == "qwen2_audio":
        config = Qwen2AudioConfig(audio_config=audio | names, text_config=text.to_dict(), **token)
        built = Qwen2AudioForConditionalGeneration(config)
    else:
        config = VoxtralConfig(audio_config=audio | wide, text_config=text.to_dict(), **token)
        built = VoxtralForConditionalGeneration(config)
    built.model.audio_tower.load_state_dict(model.model.audio_tower.encoder.state_dict())
    built.model.language_model.load_state_dict(model.model.language_model.state_dict())
    built.lm_head.load_state_dict(model.lm_head.state_dict())
    for theirs, ours in PROJECTORS[layout].items():
        projector = built.model.multi_modal_projector.get_submodule(theirs)
        projector.load_state_dict(model.model.audio_tower.connector.get_submodule(ours).state_dict())
    return built.eval()


@pytest.mark.parametrize("seconds", SECONDS)
@torch.no_grad()
def test_the_logits_are_those_of_the_released_class(layout, composed, stock, seconds):
    model, processor = composed
    rule, samples = processor.rule("audio"), sine(seconds)
    item = MediaInput("audio", samples, (seconds,))
    expansion = processor.expansion(item.size)
    ids = processor.tokenizer(f"Hear: {expansion.text} What?", return_tensors="pt")["input_ids"]
    place = ids[0].tolist().index(model.config.audio_token_id)
    placeholders = ids[:, place : place + 1].expand(-1, expansion.runs[0])
    ids = torch.cat([ids[:, :place], placeholders, ids[:, place + 1 :]], 1)
    ours = model(input_ids=ids, **processor.encode_media([item])).logits

    windows = split_windows(samples, rule)
    extractor = processor.feature_extractor
    told = extractor(
        windows,
        sampling_rate=RATE,
        padding="max_length",
        max_length=rule.window,
        return_attention_mask=True,
        return_tensors="pt",
    )
    masks = {"audioflamingo3": "input_features_mask", "qwen2_audio": "feature_attention_mask"}
    mask = {masks[layout]: told["attention_mask"]} if layout in masks else {}
    attention = {"attention_mask": torch.ones_like(ids)}
    theirs = stock(input_ids=ids, input_features=told["input_features"], **mask, **attention).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
