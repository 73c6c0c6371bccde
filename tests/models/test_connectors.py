"""Connectors against transformers' own classes with the same weights, against formulas, and with options that fail."""

import pytest
import torch
from transformers import (
    AudioFlamingo3Config,
    AutoConfig,
    Idefics2Config,
    InternVLConfig,
    Qwen2AudioConfig,
    VoxtralConfig,
)
from transformers.models.audioflamingo3.modeling_audioflamingo3 import AudioFlamingo3MultiModalProjector
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioMultiModalProjector
from transformers.models.voxtral.modeling_voxtral import VoxtralMultiModalProjector

from mllm.errors import OptionError
from mllm.models.configuration import MllmTowerConfig
from mllm.models.connectors import CONNECTORS, Layout, build_connector, connector_options, written_connector
from mllm.models.connectors.merging import grid_windows, sequence_windows

IN, OUT = 12, 16
TEXT = AutoConfig.for_model(
    "llama", hidden_size=OUT, intermediate_size=20, num_attention_heads=2, num_hidden_layers=1, vocab_size=32
)


def build(choice, *, in_size: int = IN, out_size: int = OUT):
    config = MllmTowerConfig(
        connector=written_connector(choice), feature_sizes=[in_size], text_hidden_size=out_size, rule=None
    )
    return build_connector(config).eval()


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Weights without any symmetry, norms included."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def test_patch_merge_is_the_projector_of_internvl():
    vision = {"hidden_size": IN, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = InternVLConfig(vision_config=vision, text_config=TEXT.to_dict(), downsample_ratio=0.5)
    stock = randomize(InternVLMultiModalProjector(config))
    ours = build("patch_merge")
    ours.load_state_dict(stock.state_dict())
    features = torch.randn(2, 16, IN)
    shuffled = InternVLModel.pixel_shuffle(None, features.view(2, 4, 4, IN), scale_factor=0.5).flatten(1, 2)
    assert torch.equal(ours(features), stock(shuffled))


def test_mlp_is_the_projector_of_audio_flamingo_3():
    config = AudioFlamingo3Config(audio_config={"hidden_size": IN}, text_config=TEXT.to_dict())
    stock = randomize(AudioFlamingo3MultiModalProjector(config))
    features = torch.randn(2, 6, IN)
    for choice in ("mlp", {"type": "pool", "size": 1}):
        ours = build(choice)
        ours.load_state_dict(stock.state_dict())
        assert torch.equal(ours(features), stock(features))


def test_pool_is_the_end_of_the_encoder_and_the_projector_of_audio_flamingo_3():
    """Mean of two, LayerNorm, projector; what stands behind the sound's end has no part in it."""
    config = AudioFlamingo3Config(audio_config={"hidden_size": IN}, text_config=TEXT.to_dict())
    stock = randomize(AudioFlamingo3MultiModalProjector(config))
    norm = randomize(torch.nn.LayerNorm(IN))
    ours = build({"type": "pool", "size": 2, "norm": True, "keeps_incomplete": False})
    norms = {f"layer_norm.{name}": one for name, one in norm.state_dict().items()}
    ours.load_state_dict(stock.state_dict() | norms)
    features = torch.randn(2, 9, IN)
    pooled = torch.nn.AvgPool1d(2, stride=2)(features.transpose(1, 2)).transpose(1, 2)
    expected = stock(norm(pooled))
    long, short = ours(features, Layout([(9,), (5,)], [(1.0,), (1.0,)]))
    torch.testing.assert_close(long, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(short, expected[1, :2], rtol=0, atol=1e-6)


def test_pool_with_one_layer_is_the_projector_of_qwen2_audio():
    config = Qwen2AudioConfig(audio_config={"model_type": "qwen2_audio_encoder", "d_model": IN}, text_config=TEXT)
    stock = randomize(Qwen2AudioMultiModalProjector(config))
    ours = build({"type": "pool", "layers": 1})
    ours.load_state_dict({f"linear_1.{name}": one for name, one in stock.linear.state_dict().items()})
    features = torch.randn(2, 6, IN)
    torch.testing.assert_close(ours(features), stock(features.view(2, 3, 2, IN).mean(2)), rtol=0, atol=1e-6)


def test_frame_stack_is_the_projector_of_voxtral():
    config = VoxtralConfig(audio_config={"hidden_size": IN, "intermediate_size": 4 * IN}, text_config=TEXT.to_dict())
    stock = randomize(VoxtralMultiModalProjector(config))
    ours = build("frame_stack")
    ours.load_state_dict(stock.state_dict())
    features = torch.randn(3, 8, IN)
    assert torch.equal(ours(features).flatten(0, 1), stock(features.reshape(-1, 4 * IN)))


def test_perceiver_is_the_connector_of_idefics_2():
    perceiver = {"resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 4, "num_key_value_heads": 2}
    config = Idefics2Config(
        perceiver_config={**perceiver, "resampler_head_dim": 6, "hidden_size": OUT},
        vision_config={"hidden_size": IN, "num_attention_heads": 2},
        text_config={**TEXT.to_dict(), "hidden_act": "silu"},
    )
    stock = randomize(Idefics2Connector(config))
    options = {"num_latents": 3, "depth": 2, "heads": 4, "key_value_heads": 2, "head_size": 6, "projection": 20}
    ours = build({"type": "perceiver", **options})
    ours.load_state_dict(stock.state_dict())
    features = torch.randn(2, 7, IN)
    found = ours(features, Layout([(7,), (4,)], [(1, 1), (1, 1)]))
    mask = (torch.arange(7) < torch.tensor([[7], [4]])).long()
    torch.testing.assert_close(torch.stack(found), stock(features, mask), rtol=0, atol=1e-6)


def test_fresh_latents_differ():
    """Those that begin alike stay alike."""
    latents = build({"type": "perceiver", "num_latents": 3, "heads": 4}).perceiver_resampler.latents
    assert (latents[0] - latents[1]).abs().max() > 1e-3


def test_a_modality_token_is_added_to_every_feature():
    connector = build("identity", in_size=OUT)
    features = torch.randn(2, 5, OUT)
    added = connector(features) - features
    torch.testing.assert_close(added, added[:1, :1].expand_as(added), rtol=0, atol=1e-6)
    # A LayerNorm ends the network that makes the token.
    torch.testing.assert_close(added[0, 0].mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    with pytest.raises(OptionError, match="(?s)from width 12 to 16.*as wide as the language model.*`linear`"):
        build("identity")


def test_windows_of_a_sequence_by_hand():
    features = torch.arange(1.0, 6.0).view(1, 5, 1)
    windows = sequence_windows(features, torch.tensor([4]), 3)
    assert windows.features[0, :, :, 0].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert windows.counts.tolist() == [[3, 1]]


def test_windows_of_a_grid_by_hand():
    features = torch.arange(1.0, 10.0).view(1, 9, 1)
    windows = grid_windows(features, 2)
    assert windows.features[0, :, :, 0].tolist() == [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]
    assert windows.counts.tolist() == [[4, 2, 2, 1]]


def test_the_mean_of_an_incomplete_window_is_that_of_what_it_has():
    connector = build({"type": "pool", "over": "grid", "layers": 1}, in_size=1, out_size=1)
    torch.nn.init.ones_(connector.linear_1.weight)
    torch.nn.init.zeros_(connector.linear_1.bias)
    features = torch.arange(1.0, 10.0).view(1, 9, 1)
    assert connector(features).flatten().tolist() == [3.0, 4.5, 7.5, 9.0]
    pooled = torch.nn.functional.avg_pool2d(features.view(1, 1, 3, 3), 2, ceil_mode=True)
    assert connector(features).flatten().tolist() == pooled.flatten().tolist()


@pytest.mark.parametrize(
    ("choice", "found", "remedy"),
    [
        ("qformr", "connector = 'qformr'", "one of linear, mlp"),
        ({"num_queries": 8}, "connector = None", "one of linear"),
        ({"type": "mlp", "depth": 3}, "no option 'depth'", "only per, positions, layers"),
        ({"type": "mlp", "layers": 0}, "layers = 0", "1 or more"),
        ({"type": "mlp", "layers": "two"}, "layers = 'two'", "a whole number"),
        ({"type": "mlp", "layers": True}, "layers = True", "a whole number"),
        ({"type": ["mlp"]}, r"connector = \['mlp'\]", "one of linear, mlp"),
        ({"type": "mlp", "bias": 1}, "bias = 1", "true or false"),
        ({"type": "mlp", "activation": "gelo"}, "activation = 'gelo'", "such as gelu"),
        ({"type": "linear", "per": "frame"}, "per = 'frame'", "one of view, item"),
        ({"type": "linear", "positions": -1}, "positions = -1", "0 or more"),
        ({"type": "pool", "size": 0}, "size = 0", "1 or more"),
        ({"type": "pool", "over": "time"}, "over = 'time'", "one of sequence, grid"),
        ({"type": "patch_merge", "per": "item"}, "per = 'item'", "view: the neighbours"),
        ({"type": "perceiver", "heads": 6}, "heads = 6", "a multiple of 4"),
        ({"type": "perceiver", "num_latents": 0}, "num_latents = 0", "1 or more"),
        ({"type": "perceiver", "width": -1}, "width = -1", "0 or more"),
        ({"type": "identity", "token_size": 0}, "token_size = 0", "1 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_chosen(choice, found, remedy):
    with pytest.raises(OptionError, match=f"(?s){found}.*{remedy}"):
        connector_options(choice)


def test_the_error_of_an_unknown_connector_lists_all():
    with pytest.raises(OptionError, match=", ".join(CONNECTORS)):
        connector_options("none")


def test_a_grid_needs_a_square():
    with pytest.raises(OptionError, match="(?s)17 features.*without a class token.*feature_select: patches"):
        build("patch_merge")(torch.randn(1, 17, IN))


def test_a_connector_of_one_stream_says_so():
    config = MllmTowerConfig(
        connector=written_connector("mlp"), feature_sizes=[IN, IN], text_hidden_size=OUT, rule=None
    )
    with pytest.raises(OptionError, match="(?s)MlpConnector for 2 streams.*join: channels"):
        build_connector(config)
