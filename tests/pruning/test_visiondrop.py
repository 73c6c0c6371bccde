"""VisionDrop: its decisions, and a whole prompt, against plain float64 transcriptions of the published algorithm."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mllm.errors import OptionError
from mllm.pruning.base import Item, Row
from mllm.pruning.evidence import Evidence
from mllm.pruning.scoring import QueriesKeys
from mllm.pruning.visiondrop import VisionDrop
from mllm.testing import tiny_model

NUM_PATCHES = 36  # 48 pixels in patches of 8
QFORMER = {"layers": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 10, "num_queries": 7, "dropout": 0.0}


def tiny_llava(num_layers: int, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """LLaVA-1.5 with 36 visual tokens and as many layers as one likes."""
    config = AutoConfig.for_model(
        "llava",
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 48,
            "patch_size": 8,
            "projection_dim": 32,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,  # attention that is not flat, so that scores differ
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        image_token_id=99,
        image_seq_length=NUM_PATCHES,
    )
    torch.manual_seed(0)
    return AutoModelForMultimodalLM.from_config(config).eval().to(dtype)


def one_prompt(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Five tokens, a picture, six tokens."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 90, (1, 11), generator=generator)
    ids = torch.cat([text[:, :5], torch.full((1, NUM_PATCHES), 99), text[:, 5:]], dim=1)
    pixels = torch.randn(1, 3, 48, 48, generator=generator, dtype=dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def random_evidence(
    num_vectors: int,
    *,
    num_prefix_tokens: int,
    connect: torch.nn.Module | None = None,
    num_views: int = 1,
    layer: int = -1,
) -> Evidence:
    generator = torch.Generator().manual_seed(4)
    num_patches = num_vectors // num_views
    shape = (num_views, 3, num_prefix_tokens + num_patches, 5)
    queries, keys = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    features = None if connect is None else torch.randn(num_vectors, 6, generator=generator, dtype=torch.float64)
    return Evidence(
        {layer: QueriesKeys(queries, keys, 0.5)},
        num_prefix_tokens,
        torch.arange(num_vectors)[:, None],
        features,
        connect,
    )


def random_vectors(count: int, width: int = 7) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def published_merge(
    values: torch.Tensor, keys: torch.Tensor, dominant: list[int], count: int
) -> tuple[list[int], torch.Tensor]:
    """Targets at equal distances among the rest; to each is added the mean of the others whose key is nearest."""
    rest = [place for place in range(len(values)) if place not in dominant]
    step = max(1, len(rest) // count)
    targets = rest[0::step][:count]
    others = [place for place in rest if place not in targets]
    keys = keys / keys.norm(dim=-1, keepdim=True)
    nearest = {place: int((keys[targets] @ keys[place]).argmax()) for place in others}
    merged = []
    for number, target in enumerate(targets):
        own = [values[place] for place in others if nearest[place] == number]
        merged.append(values[target] + (torch.stack(own).mean(dim=0) if own else 0))
    return targets, torch.stack(merged)


def highest(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda place: -float(scores[place]))[:count])


def encoder_scores(evidence: Evidence, *, by_class: bool) -> torch.Tensor:
    """The class token's row, summed over heads; or the mean over heads and patches of all patches' rows."""
    ((queries, keys, scaling),) = evidence.layers.values()
    prefix = evidence.num_prefix_tokens
    found = []
    for view in range(len(queries)):
        attention = (queries[view] @ keys[view].transpose(1, 2) * scaling).softmax(dim=-1)
        found.append(attention[:, 0, prefix:].sum(0) if by_class else attention[:, prefix:, prefix:].mean((0, 1)))
    return torch.cat(found)


@pytest.mark.parametrize(("ranking", "num_prefix_tokens"), [("class", 1), ("class", 0), ("received", 5)])
@pytest.mark.parametrize("is_pointwise", [True, False])
@pytest.mark.parametrize(("num_views", "layer"), [(1, -1), (3, -1), (1, 0)])
def test_what_enters_is_what_the_encoder_ranks_highest(ranking, num_prefix_tokens, is_pointwise, num_views, layer):
    """42 + 6 of 72 for an average of 32 in 32 layers; merged on features where each becomes a vector by itself."""
    connect = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.GELU(), torch.nn.Linear(7, 7)).double()
    evidence = random_evidence(
        72,
        num_prefix_tokens=num_prefix_tokens,
        connect=connect if is_pointwise else None,
        num_views=num_views,
        layer=layer,
    )
    vectors = connect(evidence.features) if is_pointwise else random_vectors(72)
    pruner = VisionDrop(tokens=32, ranking=ranking, encoder_layer=layer)
    selection = pruner.select(Item("image", vectors, evidence, None), 32)

    scores = encoder_scores(evidence, by_class=ranking == "class" and num_prefix_tokens > 0)
    keys = evidence.layers[layer].keys[:, :, num_prefix_tokens:].mean(dim=1).flatten(0, 1)
    dominant = highest(scores, 42)
    source = evidence.features if is_pointwise else vectors
    targets, merged = published_merge(source, keys, dominant, 6)
    assert selection.kept.tolist() == dominant + targets
    assert torch.equal(selection.values[:42], vectors[dominant])
    expected = connect(merged) if is_pointwise else merged
    torch.testing.assert_close(selection.values[42:], expected, rtol=0, atol=1e-9)


def random_row(num_past: int) -> Row:
    """Two pictures of 20 and 12 tokens between text, behind some tokens of earlier turns."""
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(45, 6, generator=generator, dtype=torch.float64)
    queries = torch.randn(4, 45, 3, generator=generator, dtype=torch.float64)
    keys = torch.randn(4, 45 + num_past, 3, generator=generator, dtype=torch.float64)
    return Row(hidden, (torch.arange(4, 24), torch.arange(26, 38)), queries, keys, 0.6)


@pytest.mark.parametrize("scoring", ["faithful", "corrected"])
@pytest.mark.parametrize("num_past", [0, 9])
def test_what_stays_at_a_cut_is_what_visual_tokens_rank_highest(scoring, num_past):
    """Each item by its own tokens' attention, by keys' cosines merged into hidden states."""
    row, pruner, entered = random_row(num_past), VisionDrop(tokens=10, scoring=scoring), (20, 12)
    selections = pruner.select_at_cut(row, 2, entered, 32)
    for item, num_tokens, selection in zip(row.items, entered, selections, strict=True):
        count = pruner.counts(num_tokens, 32)[16]
        num_merged = math.ceil(count / 8)
        places = torch.arange(len(row.queries[0]))
        limits = item[-1].expand(len(item)) if scoring == "corrected" else item
        logits = row.queries[:, item] @ row.keys.transpose(1, 2) * row.scaling
        hidden = torch.cat([torch.zeros(len(item), num_past, dtype=torch.bool), places > limits[:, None]], dim=1)
        attention = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)[..., num_past:]
        dominant = highest(attention.mean(dim=0)[:, item].mean(dim=0), count - num_merged)
        keys = row.keys[:, num_past:][:, item].mean(dim=0)
        targets, merged = published_merge(row.hidden[item], keys, dominant, num_merged)
        assert selection.kept.tolist() == dominant + targets
        torch.testing.assert_close(selection.values[-num_merged:], merged, rtol=0, atol=1e-9)
        assert torch.equal(selection.values[:-num_merged], row.hidden[item][dominant])


@torch.no_grad()
def published_prompt(model: PreTrainedModel, batch: dict[str, torch.Tensor], schedule: list[tuple[int, int]]):
    """The published code on one picture, without its class token: the last token's logits; tokens in each layer.

    Args:
        model: `tiny_llava`.
        batch: `one_prompt`.
        schedule: Dominant and contextual tokens of each of the four stretches.
    """
    backbone = model.model
    vision = backbone.vision_tower
    layers = vision.encoder.layers
    hidden = vision.pre_layrnorm(vision.embeddings(batch["pixel_values"]))
    for layer in layers[:-1]:  # LLaVA reads the output of the last but one
        before, hidden = hidden, layer(hidden, attention_mask=None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    attention = layers[-2].self_attn
    normed = layers[-2].layer_norm1(before)[0]
    queries, keys = (
        one(normed).view(len(normed), attention.num_heads, -1).transpose(0, 1)
        for one in (attention.q_proj, attention.k_proj)
    )
    weights = (queries @ keys.transpose(1, 2) * attention.scale).softmax(dim=-1)
    features = hidden[0, 1:]
    dominant = highest(weights[:, 0, 1:].sum(dim=0), schedule[0][0])
    _, merged = published_merge(features, keys[:, 1:].mean(dim=0), dominant, schedule[0][1])
    visual = backbone.multi_modal_projector(torch.cat([features[dominant], merged])[None])[0]

    body = backbone.language_model
    text = body.embed_tokens(batch["input_ids"])[0]
    states = torch.cat([text[:5], visual, text[5 + NUM_PATCHES :]])
    lengths = []
    num_layers = len(body.layers)
    for number, layer in enumerate(body.layers):
        angles = body.rotary_emb(states[None], position_ids=torch.arange(len(states))[None])
        stretch, rest = divmod(number * 4, num_layers)
        if number and rest == 0:
            states = published_cut(layer, states, angles, sum(schedule[stretch - 1]), *schedule[stretch])
            angles = body.rotary_emb(states[None], position_ids=torch.arange(len(states))[None])
        mask = torch.full((len(states), len(states)), -torch.inf, dtype=states.dtype).triu(1)[None, None]
        out = layer(states[None], attention_mask=mask, position_embeddings=angles)
        states = (out[0] if isinstance(out, tuple) else out)[0]
        lengths.append(len(states))
    return model.lm_head(body.norm(states[-1])), lengths


def published_cut(layer, states, angles, num_visual: int, num_dominant: int, num_contextual: int) -> torch.Tensor:
    """The picture begins behind five tokens."""
    normed, attention = layer.input_layernorm(states), layer.self_attn
    queries = attention.q_proj(normed).view(1, len(states), -1, attention.head_dim).transpose(1, 2)
    keys = attention.k_proj(normed).view(1, len(states), -1, attention.head_dim).transpose(1, 2)
    queries, keys = (one[0] for one in apply_rotary_pos_emb(queries, keys, *angles))
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    visual = slice(5, 5 + num_visual)
    logits = queries[:, visual] @ keys.transpose(1, 2) / attention.head_dim**0.5
    is_hidden = torch.ones(len(states), len(states)).triu(1).bool()[visual]
    weights = logits.masked_fill(is_hidden, -torch.inf).softmax(dim=-1)
    dominant = highest(weights.mean(dim=0)[:, visual].mean(dim=0), num_dominant)
    block = states[visual]
    _, merged = published_merge(block, keys[:, visual].mean(dim=0), dominant, num_contextual)
    return torch.cat([states[:5], block[dominant], merged, states[5 + num_visual :]])


def test_a_prompt_goes_through_the_model_as_published():
    """Encoder, four stretches of layers, positions counted anew, contextual tokens behind the dominant ones."""
    model, batch = tiny_llava(8), one_prompt()
    expected, lengths = published_prompt(model, batch, [(15, 3), (11, 2), (8, 2), (6, 1)])
    pruner = VisionDrop(tokens=12, positions="compacted", ranking="class", scoring="faithful", merging="sum")
    assert pruner.counts(NUM_PATCHES, 8) == [length - 11 for length in lengths]
    with torch.no_grad(), pruner(model):
        found = model(**batch).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert [count for (count,) in pruner.statistics.tokens_per_layer] == lengths


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("positions", ["original", "compacted"])
@pytest.mark.parametrize("ranking", ["class", "language"])
def test_layers_and_caches_hold_as_many_as_counted(num_layers, positions, ranking):
    """For language models of any depth."""
    model, batch = tiny_llava(num_layers), one_prompt()
    pruner = VisionDrop(tokens=10, positions=positions, ranking=ranking)
    with torch.no_grad(), pruner(model):
        cache = model(**batch, use_cache=True).past_key_values
    counts = pruner.counts(NUM_PATCHES, num_layers)
    assert sum(counts) / num_layers <= 10
    assert [count for (count,) in pruner.statistics.tokens_per_layer] == [11 + count for count in counts]
    assert [cache.get_seq_length(layer_idx=layer) for layer in range(num_layers)] == [11 + count for count in counts]


@pytest.mark.parametrize("positions", ["original", "compacted"])
@pytest.mark.parametrize("connector", ["mlp", "qformer"])
def test_answers_with_a_cache_are_those_without(tmp_path, connector, positions):
    """Where a connector mixes patches, too: all its tokens enter, and leave in front of the first layer."""
    options = {"mlp": {"connector": "mlp"}, "qformer": {"connector": {"type": "qformer", **QFORMER}}}[connector]
    model, _ = tiny_model(tmp_path, image=options, num_hidden_layers=4)
    model, num_tokens = model.eval(), {"mlp": 4, "qformer": 7}[connector]
    placeholder = model.config.tower_configs["image"].placeholder_token_id
    batch = {
        "input_ids": torch.tensor(
            [[1, 2, 3, *[placeholder] * num_tokens, 4, 5], [*[placeholder] * num_tokens, *range(6, 11)]]
        ),
        "pixel_values": torch.randn(2, 3, 16, 16),
    }
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    pruner = VisionDrop(tokens=2, positions=positions)
    with pruner(model):
        cached = model.generate(**batch, max_new_tokens=6, do_sample=False)
        plain = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    counts = pruner.counts(num_tokens, 4)
    assert counts[0] < num_tokens
    assert [len(pruner.statistics.items[0][0].kept[layer]) for layer in range(4)] == counts


@pytest.mark.parametrize("ranking", ["class", "language"])
def test_with_a_connector_that_mixes_patches_the_language_model_ranks(ranking):
    """Or where one wants it: nothing leaves in front of it, and its first layer already sees fewer."""
    evidence = random_evidence(9, num_prefix_tokens=1) if ranking == "language" else None
    item = Item("image", random_vectors(9), evidence, None)
    pruner = VisionDrop(tokens=3, ranking=ranking)
    assert pruner.select(item, 4) is None
    assert pruner.leaves_at_cut(0, (9,), (9,), 4)
    assert not pruner.leaves_at_cut(0, (5,), (9,), 4)


def test_vectors_of_no_patch_leave_first():
    """Ends of lines: neither ranked nor merged, though there be room for some."""
    evidence = random_evidence(12, num_prefix_tokens=1)
    patches = torch.full((15, 1), -1)
    is_patch = torch.tensor([place % 5 != 4 for place in range(15)])
    patches[is_patch] = torch.arange(12)[:, None]
    evidence = Evidence(evidence.layers, 1, patches)
    item = Item("image", random_vectors(15), evidence, None)
    few = VisionDrop(tokens=6, first=1.0).select(item, 1)
    assert len(few.kept) == 6
    assert is_patch[few.kept].all()
    assert (few.merged_into[~is_patch] == -1).all()
    assert (few.merged_into[is_patch] >= 0).all()
    nearly_all = VisionDrop(tokens=13, first=1.0).select(item, 1)
    assert len(nearly_all.kept) == 13
    assert set(is_patch.nonzero()[:, 0].tolist()) < set(nearly_all.kept.tolist())


def test_a_budget_of_one_is_one_dominant_token():
    """Nothing is merged into it; a share of all tokens is a budget, too."""
    item = Item("image", random_vectors(9), random_evidence(9, num_prefix_tokens=1), None)
    for tokens in (1, 0.11):
        selection = VisionDrop(tokens=tokens).select(item, 4)
        assert len(selection.kept) == 1
        assert selection.values is None


@pytest.mark.parametrize(
    "options",
    [
        {"contextual": 1.0},
        {"contextual": -0.1},
        {"first": 0.9},
        {"ranking": "text"},
        {"scoring": "causal"},
        {"merging": "max"},
        {"tokens": 0},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    """With the option's name and value."""
    with pytest.raises(OptionError, match=next(iter(options))):
        VisionDrop(**options)


def test_a_layer_that_the_encoder_does_not_have_is_refused():
    """LLaVA reads the output of the last but one of its three: two are passed."""
    model = tiny_llava(1)
    with pytest.raises(OptionError, match="layer -3 of an encoder, of which 2"), VisionDrop(encoder_layer=-3)(model):
        pass
    with VisionDrop(encoder_layer=-3, ranking="language")(model):
        pass
