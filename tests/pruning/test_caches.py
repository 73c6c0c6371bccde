"""A cache that a pruner filled, in the hands of its owner."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from mllm.errors import OptionError, RowError
from mllm.pruning.caches import PrunedCache, Reached, check_kind, open_cache, reached_by, remember
from mllm.testing import tiny_llm


def _filled() -> tuple[PrunedCache, list[torch.Tensor]]:
    """Two rows; 10 columns of which the first layer holds 8 and the second 6, the last 4 all."""
    cache = DynamicCache()
    for layer, length in enumerate((8, 6)):
        keys = torch.randn(2, 1, length, 3)
        cache.update(keys, keys + 1, layer)
    masks = [torch.ones(2, 8).bool(), torch.ones(2, 6).bool()]
    masks[1][0, 0] = False
    remember(cache, Reached((0, 1), tuple(masks), gap=2, tail=4, positions="original"))
    return cache, masks


def test_it_tells_its_length_in_columns_and_that_of_a_layer_in_slots():
    cache, _ = _filled()
    assert isinstance(cache, DynamicCache) and isinstance(cache, PrunedCache)
    assert (cache.get_seq_length(), cache.get_seq_length(0), cache.get_seq_length(layer_idx=1)) == (10, 8, 6)
    assert cache.get_mask_sizes(1, 1) == (7, 0)


@pytest.mark.parametrize("crop", [-3, 7])
def test_cropped_it_forgets_the_last_columns_of_all_layers(crop):
    cache, masks = _filled()
    keys = [layer.keys for layer in cache.layers]
    cache.crop(crop)
    assert cache.get_seq_length() == 7 and cache.reached.tail == 1
    for layer, key, mask, left in zip(cache.layers, keys, masks, cache.reached.past, strict=True):
        assert torch.equal(layer.keys, key[:, :, :-3]) and torch.equal(left, mask[:, :-3])
    with pytest.raises(RowError, match="cropped by 2"):
        cache.crop(-2)


def test_rows_may_be_copied_repeated_chosen_and_put_in_another_order():
    cache, masks = _filled()
    twin = copy.deepcopy(cache)
    twin.crop(-1)
    assert cache.get_seq_length() == 10 and twin.get_seq_length() == 9
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.reached.past[1], masks[1][[0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    assert torch.equal(cache.reached.past[1], masks[1][[1, 0, 0]])
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    assert torch.equal(cache.reached.past[1], masks[1][[0, 0, 1]])
    assert cache.layers[1].keys.shape[0] == 3


def test_it_is_filled_under_its_pruner_alone():
    cache, masks = _filled()
    more = torch.randn(2, 1, 1, 3)
    with pytest.raises(OptionError, match="without it"):
        cache.update(more, more, 0)
    open_cache(cache)
    assert cache.update(more, more, 0)[0].shape[2] == 9
    assert reached_by(cache, layers=(0, 1), positions="original").past[1] is masks[1]
    for other in ({"layers": (0,), "positions": "original"}, {"layers": (0, 1), "positions": "compacted"}):
        with pytest.raises(OptionError, match="cuts at layers"):
            reached_by(cache, **other)
    assert reached_by(DynamicCache(), layers=(0,), positions="original") is None
    cache.reset()
    assert type(cache) is DynamicCache and cache.get_seq_length() == 0 and "reached" not in vars(cache)


def test_other_kinds_are_refused():
    check_kind(None)
    check_kind(DynamicCache())
    check_kind(_filled()[0])
    with pytest.raises(OptionError, match="a StaticCache of StaticLayer"):
        check_kind(StaticCache(tiny_llm(vocab_size=20).config, max_cache_len=8))
    sliding = tiny_llm("mistral", vocab_size=20, sliding_window=4).config
    with pytest.raises(OptionError, match="DynamicSlidingWindowLayer"):
        check_kind(DynamicCache(config=sliding))
