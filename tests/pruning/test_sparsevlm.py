"""SparseVLM decides as published, and so do its clusters."""

import math

import pytest
import torch

from mllm.assemble import assemble
from mllm.errors import OptionError
from mllm.pruning import SparseVLM
from mllm.pruning.base import Embedded, Row
from mllm.pruning.clustering import density_peaks
from mllm.pruning.sparsevlm import raters_of
from mllm.testing import save_tiny_parts
from mllm.testing_images import save_tiny_image_encoder


def _peaks(points: list[list[float]], count: int) -> tuple[list[int], list[list[int]]]:
    """Centres and their groups, as the authors of SparseVLM compute them; ties go to the first, not to noise."""
    width, numbers = len(points[0]), range(len(points))
    apart = [[math.dist(one, other) / math.sqrt(width) for other in points] for one in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in apart]
    farthest = max(map(max, apart))
    denser = [[two for two in numbers if (density[two], one) > (density[one], two)] for one in numbers]
    to_denser = [min((row[other] for other in denser[one]), default=farthest) for one, row in enumerate(apart)]
    centres = sorted(numbers, key=lambda one: density[one] * to_denser[one], reverse=True)[:count]
    groups: list[list[int]] = [[] for _ in centres]
    for one in numbers:
        nearest = min(range(count), key=lambda group: apart[one][centres[group]])
        groups[centres.index(one) if one in centres else nearest].append(one)
    return centres, groups


@pytest.mark.parametrize(("num_points", "count"), [(1, 1), (9, 1), (9, 9), (40, 5), (83, 9)])
def test_clusters_stand_around_the_published_peaks(num_points, count):
    points = torch.randn(num_points, 5, dtype=torch.float64)
    clusters = density_peaks(points, count)
    centres, groups = _peaks(points.tolist(), count)
    assert clusters.centres.tolist() == centres
    for number, group in enumerate(groups):
        assert (clusters.joined == number).nonzero()[:, 0].tolist() == group


def test_densities_too_small_for_float32_are_ranked_all_the_same():
    points = 12 * torch.randn(40, 5)
    nearest = torch.cdist(points, points).sort().values[:, :6].square().mean(dim=1) / 5
    assert int(torch.exp(-nearest).eq(0).sum()) > 1
    assert density_peaks(points, 6).centres.tolist() == _peaks(points.double().tolist(), 6)[0]


def test_equal_points_make_as_many_clusters_as_asked():
    clusters = density_peaks(torch.ones(12, 4), 3)
    assert sorted(clusters.centres.tolist()) == sorted(set(clusters.centres.tolist()))
    assert set(clusters.joined.tolist()) == {0, 1, 2}


def _row(*, past: int = 0, merged: bool = False) -> Row:
    """5 text tokens, 40 visual, 3 text, 60 visual, 9 text; behind a first cut, fewer visual ones than have entered."""
    random = torch.Generator().manual_seed(4)
    entered = (torch.arange(5, 45), torch.arange(48, 108))
    vectors = torch.randn(117, 6, dtype=torch.float64, generator=random)
    left = torch.ones(117, dtype=torch.bool)
    if merged:
        left[20:45] = left[60:108] = False
    places = left.cumsum(0) - 1
    items = tuple(places[item[left[item]]] for item in entered)
    size = int(left.sum())
    hidden, queries, keys = (
        torch.randn(shape, dtype=torch.float64, generator=random)
        for shape in ((size, 6), (3, size, 4), (3, past + size, 4))
    )
    return Row(hidden, items, queries, keys, 0.5, Embedded(vectors, entered))


def _raters(embedded: Embedded, number: int) -> list[int]:
    """Counted among text tokens."""
    visual = {place for item in embedded.items for place in item.tolist()}
    text = [place for place in range(len(embedded.vectors)) if place not in visual]
    behind = [place for place in text if place > embedded.items[number].tolist()[-1]]
    means = dict.fromkeys(behind, 0.0)
    for place in embedded.items[number].tolist():
        products = {one: float(embedded.vectors[place] @ embedded.vectors[one]) for one in behind}
        whole = sum(map(math.exp, products.values()))
        for one in behind:
            means[one] += math.exp(products[one]) / whole / len(embedded.items[number])
    found = [one for one in behind if means[one] > sum(means.values()) / len(behind)]
    return [text.index(one) for one in found]


def _score(row: Row, raters: list[int], token: int) -> float:
    num_past, shares = row.keys.shape[1] - row.queries.shape[1], []
    for queries, keys in zip(row.queries, row.keys, strict=True):
        for rater in raters:
            seen = keys[: num_past + rater + 1] @ queries[rater] * row.scaling
            shares.append(float(seen[num_past + token].exp() / seen.exp().sum()))
    return sum(shares) / len(shares)


def test_raters_are_the_words_behind_a_picture_that_it_agrees_with_most():
    embedded = _row().embedded
    for number in (0, 1):
        raters = raters_of(embedded, number)
        assert raters.tolist() == _raters(embedded, number)
        assert 0 < len(raters) < 12
        assert int(raters.min()) >= (5, 8)[number]


def test_one_word_alone_rates_and_none_leaves_it_to_the_last_token():
    vectors = torch.randn(8, 4)
    assert raters_of(Embedded(vectors, (torch.arange(1, 7),)), 0).tolist() == [1]
    assert raters_of(Embedded(vectors, (torch.arange(1, 8),)), 0).tolist() == []
    random = torch.randn(3, 8, 4)
    row = Row(vectors, (torch.arange(1, 8),), random, random, 0.5, Embedded(vectors, (torch.arange(1, 8),)))
    kept = SparseVLM(kept=(2,), layers=(1,)).select_at_cut(row, 0, (7,), 2)[0].kept
    assert kept[:2].tolist() == row.attention(torch.tensor([7])).mean(0)[0, 1:].topk(2).indices.sort().values.tolist()


@pytest.mark.parametrize(("past", "merged"), [(0, False), (6, False), (0, True)])
def test_the_best_stay_and_the_next_live_on_in_groups(past, merged):
    row, pruner = _row(past=past, merged=merged), SparseVLM(layers=(1, 2), kept=(9, 2))
    cut = int(merged)
    for number, selection in enumerate(pruner.select_at_cut(row, cut, (40, 60), 4)):
        item = row.items[number].tolist()
        text = [place for place in range(len(row.hidden)) if not any(place in one for one in row.items)]
        raters = [text[one] for one in _raters(row.embedded, number)]
        scores = [_score(row, raters, token) for token in item]
        order = sorted(range(len(item)), key=lambda place: scores[place], reverse=True)
        num_kept = pruner.kept[cut]
        kept = sorted(order[:num_kept])
        num_recycled = int(0.3 * (len(item) - num_kept)) + 1
        recycled = sorted(order[num_kept : num_kept + num_recycled])
        hidden = row.hidden[row.items[number]]
        centres, groups = _peaks(hidden[recycled].tolist(), num_recycled // 10 + 1)
        assert selection.kept.tolist() == kept + [recycled[centre] for centre in centres]
        means = [hidden[[recycled[one] for one in group]].mean(dim=0) for group in groups]
        torch.testing.assert_close(selection.values, torch.stack([*hidden[kept], *means]), rtol=0, atol=1e-9)
        lives_in = {place: into for into, place in enumerate(kept)}
        lives_in |= {recycled[one]: num_kept + into for into, group in enumerate(groups) for one in group}
        assert selection.merged_into.tolist() == [lives_in.get(place, -1) for place in range(len(item))]


def test_published_numbers():
    pruner = SparseVLM(kept=(300, 200, 110))
    assert [cut.layer for cut in pruner.cuts(32)] == [3, 7, 16]
    first = 300 + (int(0.3 * 276) + 1) // 10 + 1
    second = 200 + (int(0.3 * (first - 200)) + 1) // 10 + 1
    third = 110 + (int(0.3 * (second - 110)) + 1) // 10 + 1
    assert pruner.counts(576, 32) == [576] * 3 + [first] * 4 + [second] * 9 + [third] * 16


def test_without_recycling_tokens_only_leave():
    selection = SparseVLM(layers=(1,), kept=(9,), recycled=0.0).select_at_cut(_row(), 0, (40, 60), 4)[0]
    assert len(selection.kept) == 9 and selection.values is None


def test_numbers_and_cuts_go_together():
    with pytest.raises(OptionError, match="3 numbers, for the cuts in front of the layers"):
        SparseVLM(kept=(5, 4)).cuts(32)
    with pytest.raises(OptionError, match="numbers from 1"):
        SparseVLM(kept=(5, 0))
    with pytest.raises(OptionError, match="a share from 0 to 1"):
        SparseVLM(recycled=1.5)


@torch.no_grad()
def test_in_a_model_raters_are_found_as_tokens_entered_and_rate_by_its_own_attention(tmp_path):
    parts = save_tiny_parts(tmp_path, num_hidden_layers=8)
    parts["image"]["encoder"] = save_tiny_image_encoder(tmp_path / "large", image_size=48)
    model = assemble(**parts)[0]
    for parameter in model.model.language_model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(5, 100, (2, 60))
    ids[0, 4:40] = ids[1, 9:45] = model.config.image_config.placeholder_token_id
    mask = torch.ones_like(ids)
    mask[0, -6:] = mask[1, :6] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 48, 48)}
    pruner = SparseVLM(tokens=16)
    seen: dict[int, list[Row]] = {}
    decide = pruner.select_at_cut

    def recorded(row, cut, *others):
        seen.setdefault(cut, []).append(row)
        return decide(row, cut, *others)

    pruner.select_at_cut = recorded
    with pruner(model):
        model(**inputs)
    model.set_attn_implementation("eager")
    outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert list(seen) == [0, 1, 2]
    for number in (0, 1):
        is_token = mask[number].bool()
        visual = (ids[number][is_token] == model.config.image_config.placeholder_token_id).nonzero()[:, 0]
        for cut in (0, 1, 2):
            embedded = seen[cut][number].embedded
            torch.testing.assert_close(embedded.vectors, outputs.hidden_states[0][number][is_token], rtol=0, atol=1e-6)
            assert torch.equal(embedded.items[0], visual)
        text = torch.tensor([place for place in range(int(is_token.sum())) if place not in visual.tolist()])
        raters = text[_raters(seen[0][number].embedded, 0)]
        paid = outputs.attentions[0][number].mean(dim=0)[is_token][:, is_token]
        scores = paid[raters][:, visual].mean(dim=0)
        num_kept = pruner._parts(36, 8)[0][0]
        stays = pruner.statistics.items[number][0].kept[1].tolist()
        assert 0 < num_kept < len(stays)
        assert set(scores.topk(num_kept).indices.tolist()) < set(stays)
