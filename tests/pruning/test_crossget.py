"""CrossGET in encoders: matching, ensembles and whole encoders against plain float64 transcriptions of its procedure.

Of arXiv 2305.17455, section 3, and the authors' code: token by token, in lists and loops.
"""

import math
from contextlib import ExitStack

import pytest
import torch
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, PreTrainedModel

from mllm.errors import OptionError
from mllm.models.encoders import ENCODERS
from mllm.pruning.crossget import CrossGet
from mllm.pruning.encoder_blocks import BLOCKS, block_of
from mllm.pruning.merging_encoder import IMPORTANCES, MergeOptions, MergingEncoder
from mllm.pruning.removal import steady_steps, steps_to
from mllm.pruning.soft_matching import Matching, ensemble, match_tokens

FAMILIES = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit")
HEADS = 4
NEVER = -math.inf


def published_matching(metric, importance, candidates: set[int], count: int) -> dict[int, int]:
    """Of one sequence: who leaves, and into whom."""
    places = range(len(metric))
    unit = [row / row.norm() for row in metric]
    alike = [
        [float(unit[i] @ unit[j]) if i != j and i in candidates and j in candidates else NEVER for j in places]
        for i in places
    ]
    ranked = sorted(places, key=lambda i: -max(alike[i]))
    redundancy = {one: max([alike[one][j] for j in ranked[at + 1 :]], default=NEVER) for at, one in enumerate(ranked)}
    leaving = sorted(places, key=lambda i: float(importance[i]) - redundancy[i])[:count]
    staying = [one for one in places if one not in leaving]
    return {one: max(staying, key=lambda j: alike[one][j]) for one in leaving}


def published_ensemble(values, sizes, importance, into: dict[int, int]):
    """Of one sequence: what those that stay become, in their order, and their sizes."""
    new_values, new_sizes = [], []
    for place in range(len(values)):
        if place in into:
            continue
        total, size = sizes[place] * values[place], sizes[place]
        for source in (one for one, target in into.items() if target == place):
            pair = torch.stack([importance[source], importance[place]]).softmax(dim=0)
            total = total + 2 * pair[0] * sizes[source] * values[source]
            total = total + (2 * pair[1] - 1) * sizes[place] * values[place]
            size = size + sizes[source]
        new_values.append(total / size)
        new_sizes.append(size)
    return torch.stack(new_values), torch.stack(new_sizes)


def published_encoder(layers, hidden, *, r, kind, protected, guide, cross, carrier, proportional=True, causal=False):
    """One sequence through an encoder's layers.

    Args:
        layers: transformers' modules, whose weights are read and whose norms and MLPs are called.
        hidden: [T, D].
        r: How many leave in each layer.
        kind: How importance is made.
        protected: Columns that never merge.
        guide: The column whose query guides; "cross" for the cross token, None for none.
        cross: What is added to the cross token of each layer; None for no such token.
        carrier: The column that it carries along, in each layer where `causal`, else in the first.
        proportional: Whether sizes count in attention.
        causal: Whether tokens see only those before them.

    Returns:
        Hidden states and columns of what is left, the cross token's last, as "cross".
    """
    columns: list = list(range(len(hidden)))
    sizes = torch.ones(len(hidden), dtype=hidden.dtype)
    if cross is not None:
        begin = hidden.mean(dim=0) if carrier is None else hidden[carrier]
        hidden, sizes, columns = torch.cat([hidden, begin[None]]), torch.cat([sizes, sizes[:1]]), [*columns, "cross"]
    for number, layer in enumerate(layers):
        if cross is not None:
            before = hidden[columns.index(carrier)] if causal else hidden[-1]
            hidden = torch.cat([hidden[:-1], (before + cross[number])[None]])
        block = BLOCKS[next(name for name in BLOCKS if hasattr(layer, BLOCKS[name].attention_norm))]
        attention = getattr(layer, block.attention)
        normed = getattr(layer, block.attention_norm)(hidden)
        q, k, v = (
            getattr(attention, name)(normed).unflatten(-1, (HEADS, -1)) for name in ("q_proj", "k_proj", "v_proj")
        )
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        if proportional:
            scores = scores + sizes.log()
        if causal:
            scores = scores + torch.full(scores.shape[1:], NEVER, dtype=scores.dtype).triu(1)
        paid = scores.softmax(dim=-1)
        mixed = torch.einsum("hij,jhd->ihd", paid, v).flatten(1)
        out = "out_proj" if hasattr(attention, "out_proj") else "o_proj"
        added = getattr(attention, out)(mixed)
        for name in block.after_attention:
            added = getattr(layer, name)(added)
        hidden = hidden + added

        steered = None if guide is None else columns.index(guide)
        paid = paid.mean(dim=0)
        if kind == "none":
            importance = torch.zeros(len(hidden), dtype=hidden.dtype)
        elif kind == "cosine":
            asked = (q.mean(dim=0) if steered is None else q[steered]).flatten()
            importance = torch.stack([torch.cosine_similarity(one.flatten(), asked, dim=0) for one in k])
        else:
            others = [row for place, row in enumerate(paid) if place != steered]
            importance = torch.stack(others).mean(dim=0) + (0 if steered is None else paid[steered])
        metric = k.flatten(1) if kind == "cosine" else k.mean(dim=1)
        candidates = {place for place, one in enumerate(columns) if one != "cross" and one not in protected}
        into = published_matching(metric, importance, candidates, min(r, len(candidates) // 2))
        hidden, sizes = published_ensemble(hidden, sizes, importance, into)
        columns = [one for place, one in enumerate(columns) if place not in into]
        added = getattr(layer, block.mlp)(getattr(layer, block.mlp_norm)(hidden))
        for name in block.after_mlp:
            added = getattr(layer, name)(added)
        hidden = hidden + added
    return hidden, columns


@pytest.mark.parametrize("counts", [[3, 0, 5], [1, 1, 1], [9, 8, 9]])
def test_matching_is_the_published_one(counts):
    metric, importance = torch.randn(3, 14, 6, dtype=torch.float64), torch.rand(3, 14, dtype=torch.float64)
    is_candidate = torch.rand(3, 14) < 0.9
    found = match_tokens(metric, importance, is_candidate, counts)
    for row, count in enumerate(counts):
        candidates = set(is_candidate[row].nonzero()[:, 0].tolist())
        expected = published_matching(metric[row], importance[row], candidates, count)
        counted = found.is_source[row]
        assert dict(zip(found.sources[row][counted].tolist(), found.targets[row][counted].tolist(), strict=True)) == (
            expected
        )


def test_of_two_alike_the_less_important_goes_into_the_other():
    metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.01], [-1.0, 1.0]]])  # 0 and 2 are the most alike
    everyone = torch.ones(1, 4, dtype=torch.bool)
    found = match_tokens(metric, torch.zeros(1, 4), everyone, [1])
    assert (int(found.sources), int(found.targets)) == (0, 2)  # of equal rank the first is held against the second
    found = match_tokens(metric, torch.tensor([[9.0, 9.0, 0.0, 9.0]]), everyone & (torch.arange(4) != 3), [1])
    assert (int(found.sources), int(found.targets)) == (2, 0)
    found = match_tokens(metric, torch.zeros(1, 4), everyone & (torch.arange(4) != 2), [1])
    assert 2 not in (int(found.sources), int(found.targets))


def test_ensemble_is_the_published_one_also_with_several_sources_of_one_target():
    values, sizes = torch.randn(2, 9, 5, dtype=torch.float64), torch.randint(1, 5, (2, 9)).double()
    importance = torch.randn(2, 9, dtype=torch.float64)
    sources, targets = torch.tensor([[0, 3, 7], [2, 4, 8]]), torch.tensor([[5, 5, 1], [6, 0, 0]])
    is_source = torch.tensor([[True, True, True], [True, True, False]])
    merged, new_sizes = ensemble(values, sizes, importance, Matching(sources, targets, is_source))
    for row in range(2):
        pairs = zip(sources[row].tolist(), targets[row].tolist(), is_source[row].tolist(), strict=True)
        into = {source: target for source, target, counts in pairs if counts}
        expected, expected_sizes = published_ensemble(values[row], sizes[row], importance[row], into)
        stays = torch.tensor([place not in into for place in range(9)])
        torch.testing.assert_close(merged[row, stays], expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(new_sizes[row, stays], expected_sizes)
        untouched = [place for place in range(9) if place not in into and place not in into.values()]
        assert torch.equal(merged[row, untouched], values[row, untouched])


def test_tokens_of_equal_importance_become_the_mean_of_all_they_stand_for():
    values, sizes = torch.tensor([[[1.0], [4.0]]]), torch.tensor([[1.0, 2.0]])
    match = Matching(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[True]]))
    merged, new_sizes = ensemble(values, sizes, torch.tensor([[0.3, 0.3]]), match)
    assert merged[0, 1] == 3.0 and new_sizes[0, 1] == 3.0


def tiny_vision(family: str, *, side: int = 4, num_layers: int = 3) -> PreTrainedModel:
    """An encoder of so many patches along a side, in float64."""
    config = AutoConfig.for_model(
        family, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers, num_attention_heads=HEADS,
        image_size=8 * side, patch_size=8, **({"num_register_tokens": 4} if "registers" in family else {}),
    )  # fmt: skip
    model = AutoModel.from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():  # norms and biases, too, as training leaves them
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def layers_of(encoder: PreTrainedModel) -> list:
    return list(max((one for one in encoder.modules() if isinstance(one, torch.nn.ModuleList)), key=len))


def merging(encoder: PreTrainedModel, options: MergeOptions, cross_tokens=None) -> MergingEncoder:
    return MergingEncoder(
        layers_of(encoder),
        block_of(encoder.config.model_type),
        num_heads=HEADS,
        num_prefix_tokens=ENCODERS[encoder.config.model_type].num_prefix_tokens(encoder.config),
        options=options,
        cross_tokens=cross_tokens,
    )


def run(encoder: PreTrainedModel, merged: MergingEncoder, pixels: torch.Tensor) -> torch.Tensor:
    with ExitStack() as stack, torch.no_grad():
        merged.take_hold(stack)
        return encoder(pixels, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", IMPORTANCES)
@pytest.mark.parametrize("has_cross_tokens", [False, True])
def test_encoder_is_the_published_one(family, kind, has_cross_tokens):
    encoder = tiny_vision(family)
    cross = torch.randn(3, 32, dtype=torch.float64) if has_cross_tokens else None
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    merged = merging(encoder, MergeOptions(lambda num: steady_steps(num, 3, 3), kind, True), cross)
    found = run(encoder, merged, pixels)
    with torch.no_grad():
        entered = encoder(pixels, output_hidden_states=True).hidden_states[0]
        num_prefix = merged.num_prefix_tokens
        for row in range(2):
            guide = "cross" if has_cross_tokens else 0 if num_prefix else None
            expected, columns = published_encoder(
                layers_of(encoder), entered[row], r=3, kind=kind, protected=range(num_prefix), guide=guide,
                cross=cross, carrier=0 if num_prefix else None,
            )  # fmt: skip
            places = [entered.shape[1] if one == "cross" else one for one in columns]
            assert merged.last.columns[row].tolist() == places
            torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_of_which_nothing_leaves_is_the_encoder_bit_for_bit(family, attention):
    encoder = tiny_vision(family).float()
    encoder.set_attn_implementation(attention)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        alone = encoder(pixels, output_hidden_states=True).hidden_states[-1]
    found = run(encoder, merging(encoder, MergeOptions(lambda num: [0, 0, 0], "attention", True)), pixels)
    assert torch.equal(found, alone)
    assert not any("forward" in vars(layer) for layer in layers_of(encoder))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pictures_do_not_touch_each_other(attention):
    encoder = tiny_vision("clip_vision_model")
    encoder.set_attn_implementation(attention)
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    options = MergeOptions(lambda num: steady_steps(num, 3, 3), "attention", True)
    merged = merging(encoder, options)
    together = run(encoder, merged, pixels)
    columns = merged.last.columns
    for row in range(3):
        torch.testing.assert_close(run(encoder, merged, pixels[row : row + 1])[0], together[row])
        assert torch.equal(merged.last.columns[0], columns[row])


def test_every_token_lives_on_in_one_that_is_left():
    encoder = tiny_vision("clip_vision_model")
    merged = merging(encoder, MergeOptions(lambda num: steady_steps(num, 4, 3), "attention", True))
    run(encoder, merged, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    last = merged.last
    for row in range(2):
        left = last.columns[row].tolist()
        assert left == sorted(left)
        assert set(last.lives_in[row].tolist()) == set(left)
        assert last.lives_in[row, left].tolist() == left
        lived = torch.bincount(last.lives_in[row], minlength=17)[left]
        assert torch.equal(lived.double(), last.sizes[row].double())


def test_flash_cannot_count_merged_tokens():
    encoder = tiny_vision("clip_vision_model")
    encoder.config._attn_implementation = "flash_attention_2"
    merged = merging(encoder, MergeOptions(lambda num: [1, 1, 1], "attention", True))
    with pytest.raises(OptionError, match="cannot count a merged token as several"):
        run(encoder, merged, torch.randn(1, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize(("num", "budget", "layers"), [(576, 64, 23), (576, 278, 23), (9, 1, 3), (9, 8, 4), (4, 9, 2)])
def test_steps_lead_to_the_budget_and_are_nearly_equal(num, budget, layers):
    steps = steps_to(num, budget, layers)
    assert len(steps) == layers and num - sum(steps) == min(budget, num)
    assert max(steps) - min(steps) <= 1 and steps == sorted(steps, reverse=True)


def test_steady_steps_never_take_more_than_half():
    assert steady_steps(9, 3, 4) == [3, 3, 1, 1]
    assert sum(steady_steps(576, 13, 23)) == 299


def tiny_clip(end_token_id: int = 2) -> CLIPModel:
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": HEADS}
    config = CLIPConfig(
        text_config={**fields, "vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": end_token_id},
        vision_config={**fields, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return CLIPModel(config).double().eval()


def texts(lengths: list[int], end: int = 59) -> torch.Tensor:
    """Words, an end token, and what is behind it."""
    ids = torch.randint(3, 50, (len(lengths), max(lengths) + 2))
    for row, length in enumerate(lengths):
        ids[row, length - 1] = end
        ids[row, length:] = 1
    return ids


@pytest.mark.parametrize("kind", IMPORTANCES)
@pytest.mark.parametrize("cross_tokens", [None, "zeros"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_retrieval_texts_are_the_published_ones(kind, cross_tokens, attention):
    model, lengths = tiny_clip(), [14, 5, 9]
    model.set_attn_implementation(attention)
    ids, encoder = texts(lengths), model.text_model.encoder
    pruner = CrossGet(text_r=2, tokens=16, importance=kind, cross_tokens=cross_tokens)
    with torch.no_grad():
        with pruner(model):
            found = model.get_text_features(input_ids=ids).pooler_output
        for row, length in enumerate(lengths):
            entered = model.text_model.embeddings(ids[row : row + 1, :length])[0]
            cross = None if cross_tokens is None else torch.zeros(3, 32, dtype=torch.float64)
            left, columns = published_encoder(
                encoder.layers, entered, r=2, kind=kind, protected=[length - 1], guide=length - 1, cross=cross,
                carrier=length - 1, causal=True,
            )  # fmt: skip
            end = model.text_model.final_layer_norm(left[columns.index(length - 1)])
            near = 1e-9 if attention == "sdpa" else 1e-5  # CLIP's eager softmax is float32
            torch.testing.assert_close(found[row], model.text_projection(end), rtol=near, atol=near)


def test_retrieval_pictures_are_the_published_ones():
    model, pixels = tiny_clip(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        with CrossGet(r=3, importance="cosine", cross_tokens="zeros")(model):
            found = model.get_image_features(pixel_values=pixels).pooler_output
        entered = model.vision_model(pixels, output_hidden_states=True).hidden_states[0]
        for row in range(2):
            left, _ = published_encoder(
                model.vision_model.encoder.layers, entered[row], r=3, kind="cosine", protected=[0], guide="cross",
                cross=torch.zeros(3, 32, dtype=torch.float64), carrier=0,
            )  # fmt: skip
            expected = model.visual_projection(model.vision_model.post_layernorm(left[0]))
            torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("end_token_id", [2, 59])
def test_retrieval_without_merges_is_the_model(end_token_id):
    model, ids = tiny_clip(end_token_id).float(), texts([14, 5, 9])
    pixels = torch.randn(3, 3, 32, 32)
    before = dict(vars(model))
    with torch.no_grad():
        alone = model(input_ids=ids, pixel_values=pixels).logits_per_image
        with CrossGet(tokens=16)(model):
            assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits_per_image, alone)
            with pytest.raises(OptionError, match="one pruner at a time"), CrossGet(tokens=16)(model):
                pass
        # Through its own mask, and with one word less where rows are long enough.
        with CrossGet(tokens=16, text_r=1)(model):
            assert not torch.equal(model(input_ids=ids, pixel_values=pixels).logits_per_image, alone)
        assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits_per_image, alone)
    assert vars(model).keys() == before.keys()
