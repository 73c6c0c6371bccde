"""Q-Formers against transformers' own models with the same weights."""

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    GraniteSpeechConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)
from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechEncoderProjector

from mllm.errors import OptionError, RowError
from mllm.models.configuration import MllmTowerConfig
from mllm.models.connectors import Layout, Question, build_connector, num_parameters, written_connector

IN, OUT, WORDS = 12, 16, 40
SMALL = {"layers": 3, "hidden_size": 8, "heads": 2, "intermediate_size": 10, "num_queries": 5}
TEXT = {
    "model_type": "opt",
    "hidden_size": OUT,
    "word_embed_proj_dim": OUT,
    "ffn_dim": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": IN,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QFORMER = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
}
STOCK = {
    "qformer": (Blip2Config, Blip2ForConditionalGeneration),
    "instruct_qformer": (InstructBlipConfig, InstructBlipForConditionalGeneration),
}
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(choice, *widths: int):
    config = MllmTowerConfig(
        connector=written_connector(choice), feature_sizes=list(widths or (IN,)), text_hidden_size=OUT
    )
    torch.manual_seed(1)
    return randomized(build_connector(config))


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Weights without any symmetry, norms and queries included."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.eval()


def stock_model(name: str) -> torch.nn.Module:
    config, kind = STOCK[name]
    model = kind(config(vision_config=VISION, qformer_config=QFORMER, text_config=TEXT, num_query_tokens=5))
    return randomized(model)


def loaded(name: str, stock: torch.nn.Module):
    """Our connector with the weights of a stock model's Q-Former, norm and projection."""
    words = {"vocab_size": WORDS, "max_question_tokens": 32} if name == "instruct_qformer" else {}
    ours = build({"type": name, **SMALL, **words, "feature_norm": True})
    theirs = stock.state_dict()
    norms = {f"feature_norm.{part}": theirs[f"vision_model.post_layernorm.{part}"] for part in ("weight", "bias")}
    ours.load_state_dict({key: (norms | theirs)[key] for key in ours.state_dict()})
    return ours


def asked() -> Question:
    ids = torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(2))
    return Question(ids, torch.tensor([[1] * 7, [1] * 4 + [0] * 3]))


@torch.no_grad()
def test_qformer_is_that_of_blip_2():
    """Norm, Q-Former and projection; our features are what the encoder's last layer gives."""
    stock = stock_model("qformer")
    features = stock.vision_model(PIXELS, output_hidden_states=True).hidden_states[-1]
    expected = stock.get_image_features(PIXELS).pooler_output
    torch.testing.assert_close(loaded("qformer", stock)(features), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_instruct_qformer_is_that_of_instructblip():
    stock, question = stock_model("instruct_qformer"), asked()
    features = stock.vision_model(PIXELS, output_hidden_states=True).hidden_states[-1]
    expected = stock.get_image_features(PIXELS, question.ids, question.mask).pooler_output
    ours = loaded("instruct_qformer", stock)
    torch.testing.assert_close(ours(features, None, question), expected, rtol=0, atol=1e-6)
    other = ours(features, None, Question(question.ids.flip(1), question.mask))
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("length", [1, 4, 6, 8])
@torch.no_grad()
def test_windowed_qformer_is_the_projector_of_granite_speech(length):
    """Also where the last window is not full."""
    projector = {**QFORMER, "model_type": "blip_2_qformer", "encoder_hidden_size": IN, "cross_attention_frequency": 1}
    config = GraniteSpeechConfig(
        text_config={**TEXT, "model_type": "opt"}, projector_config=projector, window_size=4, downsample_rate=2
    )
    stock = randomized(GraniteSpeechEncoderProjector(config))
    ours = build({"type": "windowed_qformer", **SMALL, "num_queries": 2, "window": 4, "cross_attention_frequency": 1})
    names = {"query": "query_tokens", "linear.weight": "language_projection.weight"}
    names["linear.bias"] = "language_projection.bias"
    ours.load_state_dict({names.get(key, key): value for key, value in stock.state_dict().items()})
    features = torch.randn(2, length, IN)
    torch.testing.assert_close(ours(features), stock(features), rtol=0, atol=1e-6)
    padded = torch.nn.functional.pad(features, (0, 0, 0, 5), value=9.0)
    found = torch.stack(ours(padded, Layout([(length,)] * 2, [(1.0,)] * 2)))
    torch.testing.assert_close(found, stock(features), rtol=0, atol=1e-6)


@torch.no_grad()
def test_words_that_are_padding_change_nothing():
    ours = loaded("instruct_qformer", stock_model("instruct_qformer"))
    features, question = torch.randn(2, 5, IN), asked()
    expected = ours(features, None, question)
    changed = torch.where(question.mask.bool(), question.ids, 3)
    longer = Question(*(torch.nn.functional.pad(one, (0, 4)) for one in (changed, question.mask)))
    torch.testing.assert_close(ours(features, None, longer), expected, rtol=0, atol=1e-6)


def test_without_a_question_it_says_so():
    ours = build({"type": "instruct_qformer", **SMALL, "vocab_size": WORDS})
    with pytest.raises(RowError, match=r"(?s)without a question.*image_question_ids.*encode_questions"):
        ours(torch.randn(1, 5, IN))


def local_options(**fields):
    return {"type": "multi_stream_qformer", **SMALL, "num_local_queries": 3, **fields}


@torch.no_grad()
def test_an_empty_local_stream_leaves_the_global_one_as_a_qformer_alone():
    """Of items with and without, in one batch; the Q-Former is transformers' own."""
    ours = build(local_options(per="item"))
    alone = build({"type": "qformer", **SMALL})
    canonical = {}
    for name, value in ours.state_dict().items():
        name = name.replace("qformer.layer.", "qformer.encoder.layer.")
        for part in ("crossattention", "intermediate_query", "output_query"):
            name = name.replace(f"{part}.0.", f"{part}.")
        canonical[name] = value[:, :5] if name == "query_tokens" else value
    alone.load_state_dict({name: canonical[name] for name in alone.state_dict()})
    features = torch.randn(4, 6, IN)
    with_local, without = ours(features, Layout([(6, 4, 6), (5,)], [(1, 1), (1, 1)]))
    assert with_local.shape == without.shape == (8, OUT)
    whole, short = alone(features[[0, 3]], Layout([(6,), (5,)], [(1, 1), (1, 1)]))
    torch.testing.assert_close(without[:5], short, rtol=0, atol=1e-6)
    assert (with_local[:5] - whole).abs().max() > 1e-3
    assert without.isfinite().all() and (without[5:] - without[5:].mean(0)).abs().max() > 1e-3


@torch.no_grad()
def test_of_an_empty_local_stream_nothing_is_read():
    """Not a zero either: how the local queries would read it makes no difference."""
    ours, layout = build(local_options(per="item")), Layout([(6, 6), (6,)], [(1, 1), (1, 1)])
    features = torch.randn(3, 6, IN)
    with_local, without = ours(features, layout)
    for layer in ours.qformer.layer:
        for cross in layer.crossattention[1:]:
            randomized(cross)
    changed, same = ours(features, layout)
    assert torch.equal(same, without) and (changed - with_local).abs().max() > 1e-3


@torch.no_grad()
def test_streams_of_an_encoder_and_the_views_of_an_item_are_read_alike():
    """Two streams of equal width with the weights of the other."""
    views, streams = build(local_options(per="item")), build(local_options(), IN, IN)
    streams.load_state_dict(views.state_dict())
    first, others = torch.randn(1, 6, IN), torch.randn(2, 6, IN)
    (found,) = views(torch.cat([first, others]), Layout([(6, 6, 2)], [(1, 1)]))
    local = torch.cat([others[0], others[1, :2]])[None]
    torch.testing.assert_close(found, streams((first, local))[0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_local_queries_read_their_stream_and_the_global_ones_hear_of_it():
    ours = build(local_options(), IN, 7)
    one, other = torch.randn(1, 6, IN), torch.randn(1, 4, 7)
    changed = ours((one, other + 1.0)) - ours((one, other))
    assert changed[:, :5].abs().max() > 1e-3 and changed[:, 5:].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "widths", "found"),
    [
        ({}, (IN,), "per: item"),
        ({"num_streams": 3}, (IN, IN), "num_streams: 2"),
        ({"per": "item", "num_streams": 3}, (IN,), "two streams"),
    ],
)
def test_streams_that_do_not_fit(fields, widths, found):
    with pytest.raises(OptionError, match=f"(?s)multi_stream_qformer.*{found}"):
        build(local_options(**fields), *widths)


@pytest.mark.parametrize(
    ("choice", "width", "millions"),
    [
        ({"type": "qformer"}, 1408, 105.1),
        ({"type": "qformer", "layers": 2, "cross_attention_frequency": 1}, 768, 18.9),
        ({"type": "qformer", "layers": 2, "cross_attention_frequency": 1, "num_queries": 8}, 1024, 19.7),
    ],
    ids=["BLIP-2", "Video-LLaMA, video", "Video-LLaMA, audio"],
)
def test_published_sizes(choice, width, millions):
    """Of layers and their first norm, as transformers' classes have them; no memory is taken."""
    config = MllmTowerConfig(connector=written_connector(choice), feature_sizes=[width], text_hidden_size=4096)
    outside = 768 * config.connector["num_queries"] + 769 * 4096
    assert round((num_parameters(config) - outside) / 1e6, 1) == millions


def test_another_attention_reaches_it_but_never_a_flash_one():
    ours = build({"type": "qformer", **SMALL})
    assert ours.qformer.get_correct_attn_implementation("flash_attention_2") == "sdpa"
    assert ours.qformer.get_correct_attn_implementation("eager") == "eager"
