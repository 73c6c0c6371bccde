"""HiRED's split of the budget and its choices against a transcription of the paper, and what they keep to."""

import pytest
import torch

from mllm.errors import OptionError
from mllm.pruning import Evidence, HiRED, Item
from mllm.pruning.scoring import QueriesKeys

SIDE = 6


def layer(num_views: int, *, num_tokens: int = 1 + SIDE * SIDE) -> QueriesKeys:
    return QueriesKeys(torch.randn(num_views, 2, num_tokens, 8), torch.randn(num_views, 2, num_tokens, 8), 8**-0.5)


def item(num_views: int, *, patches: torch.Tensor | None = None, **geometry) -> Item:
    if patches is None:
        patches = torch.arange(num_views * SIDE * SIDE)
    evidence = Evidence({0: layer(num_views), -1: layer(num_views)}, 1, patches[:, None], **geometry)
    return Item("image", torch.randn(len(patches), 4), evidence, None)


def class_rows(one: QueriesKeys) -> torch.Tensor:
    """In float64: what each view's class token pays to its patches, summed over heads [views, patches]."""
    queries, keys = one.queries.double(), one.keys.double()
    logits = torch.einsum("vhd,vhtd->vht", queries[:, :, 0], keys) * one.scaling
    return (logits.exp() / logits.exp().sum(dim=-1, keepdim=True)).sum(dim=1)[:, 1:]


def highest(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda place: -float(scores[place]))[:count]


def kept_as_published(one: Item, wanted: int, share: float, tiles: tuple[int, int], overview: int) -> list[int]:
    """Of an item that no view of is too small for its part."""
    evidence, (rows, columns) = one.evidence, tiles
    deep, early = class_rows(evidence.layers[-1]), class_rows(evidence.layers[0])[overview]
    of_overview = round(share * wanted)
    counted = [0] * (rows * columns)
    for place in highest(early, round((1 - share) * SIDE * SIDE)):
        y, x = divmod(place, SIDE)
        counted[int((y + 0.5) / SIDE * rows) * columns + int((x + 0.5) / SIDE * columns)] += 1
    quotas = [(wanted - of_overview) * one / sum(counted) for one in counted]
    budgets = [int(quota) for quota in quotas]
    for number in sorted(range(len(quotas)), key=lambda number: budgets[number] - quotas[number]):
        if sum(budgets) < wanted - of_overview:
            budgets[number] += 1
    budgets.insert(overview, of_overview)
    return sorted(
        view * SIDE * SIDE + place for view, budget in enumerate(budgets) for place in highest(deep[view], budget)
    )


@pytest.mark.parametrize(
    ("tiles", "overview", "share", "wanted"),
    [((2, 2), 0, 0.5, 36), ((2, 2), 0, 0.5, 9), ((1, 2), 2, 0.5, 20), ((2, 3), 6, 0.25, 50), ((3, 1), 0, 0.75, 31)],
)
def test_views_get_their_parts_and_keep_what_the_class_token_attends_to(
    tiles: tuple[int, int], overview: int, share: float, wanted: int
):
    one = item(1 + tiles[0] * tiles[1], overview=overview, tiles=tiles)
    selection = HiRED(tokens=wanted, overview=share).select(one, 2)
    assert selection.kept.tolist() == kept_as_published(one, wanted, share, tiles, overview)
    assert selection.values is None


@pytest.mark.parametrize("wanted", [1, 7, 36])
def test_one_view_keeps_what_its_class_token_attends_to(wanted: int):
    one = item(1)
    kept = HiRED(tokens=wanted).select(one, 2).kept.tolist()
    assert kept == sorted(highest(class_rows(one.evidence.layers[-1])[0], wanted))


def test_frames_get_as_much_as_each_other():
    one = item(4)
    kept = HiRED(tokens=22).select(one, 2).kept
    assert sorted((kept // (SIDE * SIDE)).bincount(minlength=4).tolist()) == [5, 5, 6, 6]


def test_tiles_of_unknown_places_share_evenly_what_the_overview_leaves():
    kept = HiRED(tokens=20).select(item(5, overview=4), 2).kept
    of_views = (kept // (SIDE * SIDE)).bincount(minlength=5).tolist()
    assert of_views[4] == 10
    assert sorted(of_views[:4]) == [2, 2, 3, 3]


def test_the_budget_is_met_whatever_survived_of_the_tiles():
    # The margins of three of four tiles were taken away, and lines end in vectors of no patch.
    parts = [torch.arange(36 * view, 36 * view + left) for view, left in enumerate([36, 36, 2, 2, 2])]
    patches = torch.cat([*parts, torch.full((5,), -1)])
    one = item(5, patches=patches, overview=0, tiles=(2, 2))
    for wanted in range(1, len(patches) + 1):
        kept = HiRED(tokens=wanted).select(one, 2).kept.tolist()
        assert len(kept) == wanted == len(set(kept))
        assert kept == sorted(kept)
        if wanted <= 78:
            assert not any(place >= 78 for place in kept)


def test_what_is_kept_of_tiles_side_by_side_stays_in_the_order_of_the_map():
    tiles = torch.arange(36, 108).view(2, SIDE, SIDE).transpose(0, 1).flatten()  # line by line
    one = item(3, patches=torch.cat([torch.arange(36), tiles]), overview=0, tiles=(1, 2))
    kept = HiRED(tokens=20).select(one, 2).kept.tolist()
    assert kept == sorted(kept)
    patches = one.evidence.patches[kept, 0].tolist()
    assert sorted(patches) == kept_as_published(one, 20, 0.5, (1, 2), 0)


def test_more_of_the_tile_in_which_there_is_more_to_see():
    one = item(5, overview=0, tiles=(2, 2))
    early = one.evidence.layers[0]
    early.queries[0, :, 0] = 10 * torch.ones(8)
    corner = torch.arange(36).view(SIDE, SIDE)[:3, 3:].flatten()  # of the second tile
    early.keys[0, :, 1:] = -1.0
    early.keys[0, :, 1 + corner] = 1.0
    kept = HiRED(tokens=20).select(one, 2).kept
    of_views = (kept // 36).bincount(minlength=5).tolist()
    assert of_views[0] == 10
    assert of_views[2] == max(of_views[1:])
    assert of_views[2] > 10 / 4 + 1


def test_an_encoder_without_a_class_token_is_refused():
    tokens = SIDE * SIDE
    layers = {0: layer(1, num_tokens=tokens), -1: layer(1, num_tokens=tokens)}
    one = Item("image", torch.randn(tokens, 4), Evidence(layers, 0, torch.arange(tokens)[:, None]), None)
    with pytest.raises(OptionError, match="class token"):
        HiRED(tokens=4).select(one, 2)


def test_without_patches_it_is_refused():
    with pytest.raises(OptionError, match="divprune"):
        HiRED(tokens=4).select(Item("image", torch.randn(9, 4), None, None), 2)


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5])
def test_the_overview_gets_a_share(share: float):
    with pytest.raises(OptionError, match="overview"):
        HiRED(overview=share)
