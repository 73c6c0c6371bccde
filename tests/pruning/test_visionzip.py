"""VisionZip's choices and merges against a transcription of the published step, and what they keep to."""

import pytest
import torch
from torch import nn

from mllm.errors import OptionError
from mllm.pruning import Evidence, Item, Selection, VisionZip
from mllm.pruning.scoring import QueriesKeys

HEADS, NUM_PATCHES = 3, 30


def random_item(num_views: int = 1, *, num_prefix_tokens: int = 1, is_pointwise: bool = True) -> Item:
    num_tokens = num_prefix_tokens + NUM_PATCHES
    queries, keys = torch.randn(2, num_views, HEADS, num_tokens, 8)
    connector = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).requires_grad_(False)
    features = torch.randn(num_views * NUM_PATCHES, 6)
    evidence = Evidence(
        {-1: QueriesKeys(queries, keys, 8**-0.5)},
        num_prefix_tokens,
        torch.arange(num_views * NUM_PATCHES)[:, None],
        features if is_pointwise else None,
        connector if is_pointwise else None,
    )
    return Item("image", connector(features), evidence, None)


def zipped(item: Item, num_dominant: int, num_contextual: int) -> tuple[list[int], torch.Tensor, dict[int, int]]:
    """The published step in float64, for one view: places, values, and which place each merged token went to."""
    evidence = item.evidence
    queries, keys, scaling = evidence.layers[-1]
    queries, keys = queries[0].double(), keys[0].double()
    prefix = evidence.num_prefix_tokens
    logits = torch.einsum("hqd,hkd->hqk", queries, keys) * scaling
    attention = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    scores = attention.sum(dim=0)[0, prefix:] if prefix else attention.mean(dim=0).mean(dim=0)
    ranked = sorted(range(NUM_PATCHES), key=lambda place: -float(scores[place]))
    dominant = sorted(ranked[:num_dominant])
    rest = [place for place in range(NUM_PATCHES) if place not in dominant]
    metric = keys.mean(dim=0)[prefix:]
    metric = metric / metric.norm(dim=-1, keepdim=True)
    targets = rest[:: max(1, len(rest) // num_contextual)][:num_contextual] if num_contextual else []
    went_to = {}
    for place in rest:
        if place not in targets and targets:
            went_to[place] = max(targets, key=lambda target: float(metric[place] @ metric[target]))
    base = item.vectors if evidence.features is None else evidence.features
    merged = []
    for target in targets:
        group = [base[place].double() for place, other in went_to.items() if other == target]
        merged.append(base[target].double() + (sum(group) / len(group) if group else 0))
    contextual = torch.stack(merged) if merged else base[:0].double()
    if evidence.connect is not None:
        contextual = evidence.connect.double()(contextual)
        evidence.connect.float()
    values = torch.cat([item.vectors[dominant].double(), contextual]) if merged else item.vectors[dominant].double()
    return dominant + targets, values, went_to


def values_of(item: Item, selection: Selection) -> torch.Tensor:
    return item.vectors[selection.kept] if selection.values is None else selection.values


@pytest.mark.parametrize("is_pointwise", [True, False])
@pytest.mark.parametrize("num_prefix_tokens", [1, 5, 0])
@pytest.mark.parametrize(("wanted", "num_contextual"), [(1, 0), (6, 1), (13, 2), (16, 2), (29, 5)])
def test_tokens_are_zipped_as_published(wanted: int, num_contextual: int, num_prefix_tokens: int, is_pointwise: bool):
    item = random_item(num_prefix_tokens=num_prefix_tokens, is_pointwise=is_pointwise)
    selection = VisionZip(tokens=wanted).select(item, 2)
    places, values, went_to = zipped(item, wanted - num_contextual, num_contextual)
    assert selection.kept.tolist() == places
    torch.testing.assert_close(values_of(item, selection).double(), values, atol=1e-5, rtol=1e-5)
    if num_contextual:
        lives_in = {place: number for number, place in enumerate(places)}
        lives_in |= {place: lives_in[target] for place, target in went_to.items()}
        assert selection.merged_into.tolist() == [lives_in.get(place, -1) for place in range(NUM_PATCHES)]


@pytest.mark.parametrize(("tokens", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_published_budgets_are_split_as_published(tokens: int, contextual: int):
    assert round(VisionZip(tokens=tokens).contextual * tokens) == contextual


def test_each_view_is_zipped_as_if_it_were_alone():
    item = random_item(3, is_pointwise=False)
    selection = VisionZip(tokens=36).select(item, 2)
    places, lives_in = set(), {}
    for view in range(3):
        own = slice(view * NUM_PATCHES, (view + 1) * NUM_PATCHES)
        one = item.evidence.layers[-1]
        layers = {-1: QueriesKeys(one.queries[view : view + 1], one.keys[view : view + 1], one.scaling)}
        alone = Item("image", item.vectors[own], Evidence(layers, 1, torch.arange(NUM_PATCHES)[:, None]), None)
        of_view = VisionZip(tokens=12).select(alone, 2)
        for number, place in enumerate(of_view.kept.tolist()):
            places.add(place + own.start)
            here = (selection.kept == place + own.start).nonzero()[0, 0]
            torch.testing.assert_close(selection.values[here], of_view.values[number])
        for place, number in enumerate(of_view.merged_into.tolist()):
            lives_in[place + own.start] = int(of_view.kept[number]) + own.start
    assert set(selection.kept.tolist()) == places
    for place, number in enumerate(selection.merged_into.tolist()):
        assert int(selection.kept[number]) == lives_in[place]


def test_merged_tokens_come_last_also_where_views_stand_side_by_side():
    item = random_item(2)
    map_of_views = torch.arange(2 * NUM_PATCHES).view(2, 5, 6).transpose(0, 1).reshape(-1, 1)  # line by line
    evidence = Evidence(item.evidence.layers, 1, map_of_views)
    selection = VisionZip(tokens=20).select(Item("image", item.vectors, evidence, None), 2)
    kept = selection.kept.tolist()
    assert kept[:16] == sorted(kept[:16])
    is_merged = (selection.values != item.vectors[selection.kept]).any(dim=1)
    assert is_merged.tolist() == [False] * 16 + [True] * 4


def test_ends_of_lines_leave_before_any_patch():
    item = random_item()
    patches = torch.cat([item.evidence.patches, torch.full((4, 1), -1)])
    evidence = Evidence(item.evidence.layers, 1, patches)
    with_ends = Item("image", torch.cat([item.vectors, torch.zeros(4, 4)]), evidence, None)
    for wanted in range(1, NUM_PATCHES + 5):
        kept = VisionZip(tokens=wanted).select(with_ends, 2).kept.tolist()
        assert len(set(kept)) == wanted
        assert sum(place >= NUM_PATCHES for place in kept) == max(0, wanted - NUM_PATCHES)


def test_gradients_reach_the_connector_through_merged_tokens():
    item = random_item()
    connector = item.evidence.connect.requires_grad_(True)
    vectors = connector(item.evidence.features)
    selection = VisionZip(tokens=12).select(Item("image", vectors, item.evidence, None), 2)
    (gradient,) = torch.autograd.grad(selection.values[-2:].sum(), connector[0].weight)
    assert bool(gradient.any())


def test_without_patches_it_is_refused():
    with pytest.raises(OptionError, match="divprune"):
        VisionZip(tokens=4).select(Item("image", torch.randn(9, 4), None, None), 2)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_not_all_tokens_are_merged_ones(share: float):
    with pytest.raises(OptionError, match="contextual"):
        VisionZip(contextual=share)
