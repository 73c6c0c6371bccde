"""An audio encoder inside our tower gives what the stock model gives, whatever stands around it in its checkpoint."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    AutoFeatureExtractor,
    ClapAudioConfig,
    ClapFeatureExtractor,
    HubertConfig,
    SpeechT5FeatureExtractor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from mllm import load_model, load_processor
from mllm.assemble import assemble
from mllm.errors import CompositionError, OptionError
from mllm.models.audio_families import AUDIO_ENCODERS
from mllm.models.encoders import native_shape, unused_parameters
from mllm.processing.media import MediaInput
from mllm.sizes.audio import AudioTokenRule
from mllm.testing import save_tiny_parts, tiny_model
from mllm.testing_sounds import AUDIO_FAMILIES, RATE, save_tiny_audio_encoder, sine, tiny_audio_model

SECONDS = {"whisper": 0.7, "audio-spectrogram-transformer": 0.7, "clap": 0.4, "wav2vec2": 1.0, "hubert": 1.0}
"""Of the sound below. What the large wav2vec2 is told by a mask the others have to guess, so theirs fill a window."""


@pytest.fixture(scope="module", params=AUDIO_FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def composed(family, tmp_path_factory):
    window = {} if family in ("whisper", "audio-spectrogram-transformer", "clap") else {"window_seconds": 1.0}
    return tiny_model(tmp_path_factory.mktemp(family), audio={"encoder": family, **window})


_IN_EACH = dict.fromkeys(("wav2vec2", "wav2vec2-layer", "hubert"), "encoder.layers.0.attention.k_proj.weight")
_IN_EACH |= {"whisper": "encoder.conv1.weight", "clap": "audio_encoder.patch_embed.proj.weight"}
_IN_EACH |= {"audio-spectrogram-transformer": "patch_embeddings.projection.weight"}


def _sound(family: str) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 0.02, RATE).astype(np.float32)
    return (sine(1.0) + noise)[: round(SECONDS.get(family, 0.7) * RATE)]


def _item(samples: np.ndarray) -> MediaInput:
    return MediaInput("audio", samples, (len(samples) / RATE,))


@torch.no_grad()
def _stock_features(family: str, samples: np.ndarray) -> torch.Tensor:
    """What the stock model's encoder gives for one sound that its own preprocessing prepared."""
    model, extractor = tiny_audio_model(family)
    inputs = extractor(samples, sampling_rate=RATE, return_tensors="pt")
    if family == "whisper":
        return model.get_encoder()(inputs["input_features"]).last_hidden_state
    if family == "audio-spectrogram-transformer":
        patches = model.base_model(inputs["input_values"]).last_hidden_state[0, 2:]
        rows = [patches[row * 9 : row * 9 + 9] for row in range(3)]  # of one pitch each
        return torch.stack([rows[row][moment] for moment in range(9) for row in range(3)])[None]
    if family == "clap":
        out = model.audio_model(inputs["input_features"], is_longer=torch.tensor([[False]])).last_hidden_state
        return torch.stack([out[0, :, pitch, moment] for moment in range(32) for pitch in range(2)])[None]
    return model.base_model(inputs["input_values"]).last_hidden_state


@torch.no_grad()
def test_features_are_those_of_the_stock_model(family, composed):
    model, processor = composed
    samples = _sound(family)
    inputs = processor.encode_media([_item(samples)])
    features = model.model.audio_tower.encode(inputs["input_features"], inputs["audio_sizes"])
    expected = _stock_features(family, samples)
    count = processor.rule("audio").views((len(samples) / RATE,))[0]
    assert 1 < count <= expected.shape[1]
    assert features.shape[1] == processor.rule("audio").features
    torch.testing.assert_close(features[:, :count], expected[:, :count], rtol=1e-4, atol=1e-5)


def test_a_mask_hides_the_silence_that_fills_a_window(tmp_path):
    """The first window of a long sound is full, the second nearly empty: as each alone, without a window around it."""
    model, processor = tiny_model(tmp_path, audio={"encoder": "wav2vec2-layer", "window_seconds": 0.5})
    samples = _sound("wav2vec2")[: round(0.6 * RATE)]
    inputs = processor.encode_media([_item(samples)])
    with torch.no_grad():
        features = model.model.audio_tower.encode(inputs["input_features"], inputs["audio_sizes"])
    for view, part in enumerate((samples[:8000], samples[8000:])):
        expected = _stock_features("wav2vec2-layer", part)
        torch.testing.assert_close(features[view : view + 1, : expected.shape[1]], expected, rtol=1e-4, atol=1e-5)


def test_layers_above_the_features_are_left_out(family, tmp_path):
    encoder = save_tiny_audio_encoder(tmp_path / "audio", family)
    parts = save_tiny_parts(tmp_path)
    if family == "clap":
        with pytest.raises(CompositionError, match="feature_layer = -2"):
            assemble(**parts, audio={"encoder": encoder, "feature_layer": -2})
        return
    stock, extractor = tiny_audio_model(family)
    model, processor = assemble(**parts, audio={"encoder": encoder, "feature_layer": -2, "window_seconds": 1.0})
    assert model.model.audio_tower.encoder.config.num_hidden_layers == 2
    inputs = processor.encode_media([_item(sine(1.0))])
    with torch.no_grad():
        features = model.model.audio_tower.encode(inputs["input_features"], inputs["audio_sizes"])
        body = stock.get_encoder() if family == "whisper" else stock.base_model
        expected = body(_stock_inputs(family, inputs), output_hidden_states=True).hidden_states[-2]
    if family != "audio-spectrogram-transformer":
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    else:  # in another order
        ordered = expected[:, 2:].unflatten(1, (3, 9)).transpose(1, 2).flatten(1, 2)
        torch.testing.assert_close(features, ordered[:, : features.shape[1]], rtol=1e-4, atol=1e-5)


def _stock_inputs(family: str, inputs: dict) -> torch.Tensor:
    return inputs["input_features"]


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_every_parameter_that_is_not_left_alone_gets_a_gradient(family, feature_layer, tmp_path):
    if family == "clap" and feature_layer == -2:
        return
    audio = {"encoder": family, "feature_layer": feature_layer, "window_seconds": 1.0}
    model, processor = tiny_model(tmp_path, audio=audio)
    tower = model.model.audio_tower.train()
    inputs = processor.encode_media([_item(_sound("wav2vec2")), _item(sine(0.4, pitch=900.0))])
    tower.encode(inputs["input_features"], inputs["audio_sizes"]).square().sum().backward()
    unused = unused_parameters(tower.encoder.config)
    for name, parameter in tower.encoder.named_parameters():
        is_touched = parameter.grad is not None and bool(parameter.grad.any())
        # The bias of keys moves all scores alike.
        if "k_proj.bias" not in name and "key.bias" not in name:
            assert is_touched != name.startswith(unused), name


@torch.no_grad()
def test_a_sound_is_the_same_in_any_company(family, composed):
    model, processor = composed
    if family == "clap":  # its batch norms would look around in training
        model.model.audio_tower.train()
        for module in model.model.audio_tower.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    sounds = [_item(sine(seconds, pitch=200 + 300 * seconds)) for seconds in (0.3, 2.2, 1.0)]
    together = model.model.get_audio_features(**processor.encode_media(sounds)).pooler_output
    for one, expected in zip(sounds, together, strict=True):
        alone = model.model.get_audio_features(**processor.encode_media([one])).pooler_output[0]
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
        assert len(alone) == sum(processor.expansion(one.size).runs)
    model.eval()


@torch.no_grad()
def test_silence_is_a_sound(family, composed):
    model, processor = composed
    silence = [_item(np.zeros(samples, np.float32)) for samples in (1, 20, RATE, 2 * RATE + 1)]
    outputs = model.model.get_audio_features(**processor.encode_media(silence)).pooler_output
    assert all(bool(one.isfinite().all()) for one in outputs)
    assert [len(one) for one in outputs] == [sum(processor.expansion(one.size).runs) for one in silence]


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"feature_layer": 2}, {"window_seconds": 0.5}, {"pool_time": True}])
def test_saved_and_loaded_it_hears_the_same(family, how, tmp_path):
    if family != "whisper" and how != ({} if family == "clap" else {"feature_layer": 2}):
        return  # the others are options of Whisper alone, or of the rule
    model, processor = tiny_model(tmp_path, audio={"encoder": family, "window_seconds": 1.0, **how})
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    items = [_item(sine(1.3)), _item(sine(0.2, pitch=700.0))]
    expected = model.model.get_audio_features(**processor.encode_media(items)).pooler_output
    for attention in (None, "sdpa", "eager"):  # CLAP has one of its own
        loaded = load_model(tmp_path / "saved", attn_implementation=attention)
        inputs = load_processor(tmp_path / "saved").encode_media(items)
        found = loaded.model.get_audio_features(**inputs).pooler_output
        tolerance = 1e-5 if attention == "eager" else 0.0
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@torch.no_grad()
def test_a_rank_without_sounds_has_a_view_to_encode(composed):
    model, processor = composed
    tower, rule = model.model.audio_tower, processor.rule("audio")
    features = tower.encode(tower.native_zeros())
    assert features.shape == (1, rule.features, model.config.audio_config.feature_sizes[0])
    assert features.isfinite().all()


@torch.no_grad()
def test_in_bfloat16_it_hears_nearly_the_same(composed):
    model, processor = composed
    inputs = processor.encode_media([_item(sine(1.3))])
    expected = model.model.get_audio_features(**inputs).pooler_output[0]
    found = copy.deepcopy(model).to(torch.bfloat16).model.get_audio_features(**inputs).pooler_output[0]
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.95


@torch.no_grad()
def test_in_chunks_it_hears_the_same(composed):
    model, processor = composed
    inputs = processor.encode_media([_item(sine(2.3)), _item(sine(0.4))])
    expected = model.model.get_audio_features(**inputs).pooler_output
    model.model.set_encoder_chunk(3)
    found = model.model.get_audio_features(**inputs).pooler_output
    model.model.set_encoder_chunk(None)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_stock_calls_of_the_processor_split_sounds_too(composed):
    """`processor(text=..., audio=...)`, as pipelines call it, gives what training gives."""
    model, processor = composed
    sounds = [sine(2.3), sine(0.4)]
    inputs = processor(text=["<audio> one <audio>"], audio=sounds, return_tensors="pt")
    expected = processor.encode_media([_item(one) for one in sounds])
    assert all(torch.equal(inputs[name], tensor) for name, tensor in expected.items())
    counts = [sum(processor.expansion((len(one) / RATE,)).runs) for one in sounds]
    assert int((inputs["input_ids"] == model.config.audio_token_id).sum()) == sum(counts)
    assert model(**inputs).logits.isfinite().all()


def test_a_shorter_window_of_whisper_is_the_beginning_of_its_own(tmp_path):
    """Its table of positions is cut, and 32 of 50 frames remain of a second."""
    model, processor = tiny_model(tmp_path, audio={"window_seconds": 0.63})
    tower, rule = model.model.audio_tower, processor.rule("audio")
    assert (rule.window, rule.features) == (32 * 320, 32)
    stock = tiny_audio_model("whisper")[0].get_encoder()
    torch.testing.assert_close(tower.encoder.embed_positions.weight, stock.embed_positions.weight[:32])
    inputs = processor.encode_media([_item(sine(1.0))])
    assert inputs["input_features"].shape == (2, 16, 64)
    assert [len(one) for one in model.model.get_audio_features(**inputs).pooler_output] == [50]


@pytest.mark.parametrize(("of", "seconds"), [("whisper", 2.0), ("clap", 1.5), ("wav2vec2", 0.0001)])
def test_windows_that_an_encoder_cannot_read_are_refused(of, seconds, tmp_path):
    with pytest.raises(OptionError, match="window_seconds"):
        tiny_model(tmp_path, audio={"encoder": of, "window_seconds": seconds})


def test_keys_are_checked(family, tmp_path):
    parts = save_tiny_parts(tmp_path, audio={"encoder": family})
    path = tmp_path / "audio_encoder" / "model.safetensors"
    tensors = load_file(path)
    name = next(key for key in sorted(tensors) if key.endswith(_IN_EACH[family]))
    save_file({key: value for key, value in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(CompositionError, match="keys missing"):
        assemble(**parts)
    save_file({**tensors, "strange.weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CompositionError, match=r"left over \['strange.weight'\]"):
        assemble(**parts)


PUBLISHED = {
    "whisper": (WhisperConfig(), WhisperFeatureExtractor(), 1500),  # 30 s
    "audio-spectrogram-transformer": (ASTConfig(), ASTFeatureExtractor(), 1212),  # 10.24 s
    "wav2vec2": (Wav2Vec2Config(), Wav2Vec2FeatureExtractor(), 499),  # 10 s
    "hubert": (HubertConfig(), Wav2Vec2FeatureExtractor(), 499),
    "clap": (ClapAudioConfig(depths=[1, 1, 1, 1]), ClapFeatureExtractor(), 64),  # 10 s
}
"""Families at the sizes they were published in, and the features of a window."""


@pytest.mark.parametrize("family", sorted(PUBLISHED))
def test_features_of_the_published_sizes(family):
    config, extractor, expected = PUBLISHED[family]
    window = AUDIO_ENCODERS[family].window(config, extractor, None)
    rule = AudioTokenRule(
        sampling_rate=extractor.sampling_rate,
        window=window.samples,
        samples_per_step=window.samples_per_step,
        first_step=window.first_step,
        features_per_step=window.features_per_step,
    )
    assert rule.features == expected
    with torch.device("cpu" if family == "clap" else "meta"), torch.no_grad():  # its attention looks at numbers
        outputs = AUDIO_ENCODERS[family].kind(config).eval()(torch.zeros(1, *native_shape(config, rule)))
    sizes = outputs.last_hidden_state.shape
    assert {"clap": sizes[-2] * sizes[-1], "audio-spectrogram-transformer": sizes[1] - 2}.get(
        family, sizes[1]
    ) == expected


def test_preprocessing_that_does_not_fit_is_refused(tmp_path):
    parts = save_tiny_parts(tmp_path, audio={})
    WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(tmp_path / "audio_encoder")
    with pytest.raises(CompositionError, match="80 pitches, and a 'whisper' encoder\nexpected: 16"):
        assemble(**parts)
    SpeechT5FeatureExtractor().save_pretrained(tmp_path / "audio_encoder")
    with pytest.raises(OptionError, match="a SpeechT5FeatureExtractor for sounds\nexpected: one of Whisper"):
        assemble(**parts)
    for file in tmp_path.glob("audio_encoder/*preprocessor_config.json"):
        file.unlink()
    with pytest.raises(CompositionError, match="has no preprocessing of sounds"):
        assemble(**parts)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"clips": -1}, OptionError, "-1 clips"),
        ({"clips": 9, "connector": {"type": "mlp", "positions": 8}}, OptionError, "9 clips, and a connector with 8"),
        ({"connector": {"type": "pool", "over": "grid"}}, CompositionError, "on a square grid .* and sounds"),
    ],
)
def test_layouts_that_no_sound_has_are_refused(options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        tiny_model(tmp_path, audio=options)


def test_other_encoders_are_named_as_what_they_are(tmp_path):
    parts = save_tiny_parts(tmp_path)
    with pytest.raises(CompositionError, match="an audio encoder of one of these types: whisper"):
        assemble(**parts, audio={"encoder": parts["image"]["encoder"]})
    with pytest.raises(CompositionError, match="feature_layer = 7"):
        assemble(**parts, audio={"encoder": save_tiny_audio_encoder(tmp_path / "a"), "feature_layer": 7})
    with pytest.raises(CompositionError, match="pool_time with"):
        assemble(**parts, audio={"encoder": save_tiny_audio_encoder(tmp_path / "b", "hubert"), "pool_time": True})
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "b").sampling_rate == RATE
