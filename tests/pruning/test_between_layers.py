"""FastV and PyramidDrop decide as published; methods between layers meet the average that they are given."""

import math
from functools import partial

import pytest
import torch

from mllm.assemble import assemble
from mllm.errors import OptionError
from mllm.pruning import FastV, PyramidDrop, Random, Row, SparseVLM, Uniform
from mllm.testing import save_tiny_parts
from mllm.testing_images import save_tiny_image_encoder

NUM_LAYERS = 8
METHODS = {
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "random": partial(Random, layer=1),
    "sparsevlm": SparseVLM,
    "uniform": partial(Uniform, layer=2),
}


def _row(*, lengths: tuple[int, ...], num_text: int, num_past: int = 0, num_heads: int = 3) -> Row:
    """Text, an item, text, an item, ... and text, all by chance, in float64."""
    items, at = [], 0
    for length in lengths:
        items.append(torch.arange(at + num_text, at + num_text + length))
        at += num_text + length
    size = at + num_text
    random = torch.Generator().manual_seed(size)
    draw = [torch.randn(shape, dtype=torch.float64, generator=random) for shape in
            ((size, 6), (num_heads, size, 4), (num_heads, num_past + size, 4))]  # fmt: skip
    return Row(draw[0], tuple(items), draw[1], draw[2], 0.5)


def _last_pays(row: Row, token: int) -> float:
    """Mean over heads of what the last token pays to another; it sees all keys."""
    num_past = row.keys.shape[1] - row.queries.shape[1]
    shares = []
    for queries, keys in zip(row.queries.tolist(), row.keys.tolist(), strict=True):
        products = [sum(q * k for q, k in zip(queries[-1], key, strict=True)) * row.scaling for key in keys]
        whole = sum(map(math.exp, products))
        shares.append(math.exp(products[num_past + token]) / whole)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("num_past", [0, 5])
@pytest.mark.parametrize(
    ("pruner", "num_cuts"), [(FastV(tokens=12), 1), (PyramidDrop(tokens=12), 3)], ids=["fastv", "pyramiddrop"]
)
def test_those_stay_that_the_last_token_looks_at(pruner, num_cuts, num_past):
    row = _row(lengths=(20, 30), num_text=4, num_past=num_past)
    for cut in range(num_cuts):
        selections = pruner.select_at_cut(row, cut, (20, 30), 32)
        for item, entered, selection in zip(row.items, (20, 30), selections, strict=True):
            count = pruner.left(entered, 32)[cut]
            paid = {place: _last_pays(row, token) for place, token in enumerate(item.tolist())}
            best = sorted(paid, key=paid.get, reverse=True)[:count]
            assert selection.kept.tolist() == sorted(best)
            assert selection.values is None


def test_an_item_no_longer_than_its_budget_stays_whole():
    row = _row(lengths=(3, 30), num_text=2)
    assert FastV(tokens=12).select_at_cut(row, 0, (3, 30), 32)[0] is None


def test_published_settings_follow_from_the_average():
    for tokens, left in ((0.765625, 432), (0.53125, 288), (0.296875, 144)):  # FastV: K = 2, R = 25, 50, 75 %
        assert FastV(tokens=tokens).counts(576, 32) == [576] * 2 + [left] * 30
        assert FastV(tokens=tokens).counts(2880, 32) == [2880] * 2 + [5 * left] * 30
    stretches = [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8  # PyramidDrop: half of them, three times
    assert PyramidDrop(tokens=270).counts(576, 32) == PyramidDrop(tokens=0.46875).counts(576, 32) == stretches
    assert [cut.layer for cut in PyramidDrop().cuts(40)] == [10, 20, 30]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("num_layers", [3, 4, 7, 24, 32])
def test_the_average_is_met_and_never_exceeded(method, num_layers):
    for num_tokens in (2, 9, 100, 576):
        for tokens in range(1, num_tokens + 1, 1 + num_tokens // 20):
            pruner = method(tokens=tokens)
            try:
                counts = pruner.counts(num_tokens, num_layers)
            except OptionError as error:
                assert "tokens or more" in str(error)
                first = pruner.cuts(num_layers)[0].layer
                assert first * num_tokens + num_layers - first > tokens * num_layers
                continue
            assert counts == sorted(counts, reverse=True) and len(counts) == num_layers and counts[-1] >= 1
            assert counts[0] == num_tokens
            assert tokens * num_layers - num_layers < sum(counts) <= tokens * num_layers


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_model_of_too_few_layers_is_refused(method):
    with pytest.raises(OptionError, match="two layers or more"):
        method().cuts(1)


def test_layers_that_a_model_does_not_have_are_refused():
    wrong = (FastV(layer=8), FastV(layer=0), PyramidDrop(layers=(4, 8)), SparseVLM(layers=(4, 3)), Random(layer=-1))
    for pruner in wrong:
        with pytest.raises(OptionError, match=r"ascending layers from 1 to 7"):
            pruner.cuts(8)


@torch.no_grad()
def test_baselines_choose_in_front_of_a_later_layer_as_in_front_of_the_first(tmp_path):
    model = _model(tmp_path)
    for tokens, left in ((36, 36), (16, 9), (10, 1)):
        pruner = Uniform(tokens=tokens, layer=2)  # (8 * 16 - 2 * 36) / 6 is nine and a third
        with pruner(model):
            model(**_inputs(model))
        for item in pruner.statistics.items[0]:
            assert item.kept[0].tolist() == list(range(36))
            assert item.kept[2].tolist() == [(2 * one + 1) * 36 // (2 * left) for one in range(left)]
    assert Random(tokens=10).cuts(8) == () and Random(tokens=10).counts(36, 8) == [10] * 8


def _model(tmp_path):
    """Eight layers and 36 visual tokens, sharp enough for rankings to differ."""
    parts = save_tiny_parts(tmp_path, num_hidden_layers=NUM_LAYERS)
    parts["image"]["encoder"] = save_tiny_image_encoder(tmp_path / "large", image_size=48)
    model = assemble(**parts)[0]
    for name, parameter in model.named_parameters():
        if "proj" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def _inputs(model) -> dict[str, torch.Tensor]:
    token, size = model.config.image_config.placeholder_token_id, 48
    text = torch.randint(5, 100, (1, 30))
    image = torch.full((1, 36), token)
    ids = torch.cat([text[:, :4], image, text[:, 4:9], image, text[:, 9:]], dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, size, size)}


@pytest.mark.parametrize(
    ("pruner", "decides"), [(FastV(tokens=16), 1), (PyramidDrop(tokens=16), 2)], ids=["fastv", "pyramiddrop"]
)
@torch.no_grad()
def test_decisions_in_a_model_follow_its_own_attention(tmp_path, pruner, decides):
    """Both leave in front of layer 2 of 8; FastV reads the layer before."""
    model = _model(tmp_path)
    inputs = _inputs(model)
    with pruner(model):
        model(**inputs)
    model.set_attn_implementation("eager")
    paid = model(**inputs, output_attentions=True).attentions[decides][0, :, -1].mean(dim=0)
    visual = (inputs["input_ids"][0] == model.config.image_config.placeholder_token_id).nonzero()[:, 0]
    for item, columns in zip(pruner.statistics.items[0], visual.split(36), strict=True):
        count = pruner.left(36, NUM_LAYERS)[0]
        assert item.kept[2].tolist() == paid[columns].topk(count).indices.sort().values.tolist()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@torch.no_grad()
def test_layers_see_as_many_tokens_as_counted(tmp_path, method):
    model = _model(tmp_path)
    pruner = method(tokens=16)
    with pruner(model):
        model(**_inputs(model))
    assert pruner.statistics.tokens_per_layer == [[30 + 2 * count] for count in pruner.counts(36, NUM_LAYERS)]


@torch.no_grad()
def test_a_budget_out_of_reach_leaves_no_trace(tmp_path):
    model = _model(tmp_path)
    inputs = _inputs(model)
    before = model(**inputs).logits
    message = "9 of 36 tokens, on average over 8 layers of which the first 2 see all"
    with pytest.raises(OptionError, match=message), FastV(tokens=9)(model):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, before)
