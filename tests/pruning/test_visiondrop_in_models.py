"""VisionDrop in every stock model: exact counts per layer, and the same answers with a cache and without."""

import pytest
import torch

from mllm.pruning.anatomy import UNSUPPORTED
from mllm.pruning.visiondrop import VisionDrop
from mllm.testing_stock import STOCK_FAMILIES, tiny_stock_batch, tiny_stock_model

FAMILIES = [family for family in STOCK_FAMILIES if family not in UNSUPPORTED]


@pytest.mark.parametrize("ranking", ["class", "language"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models_see_as_many_tokens_as_said(family, ranking):
    """Whether the encoder ranks, of which some have no class token, or the language model."""
    model, pruner = tiny_stock_model(family), VisionDrop(tokens=2, ranking=ranking)
    batch = tiny_stock_batch(model)
    batch.pop("labels")
    with torch.no_grad(), pruner(model):
        cached = model.generate(**batch, max_new_tokens=3, do_sample=False)
        plain = model.generate(**batch, max_new_tokens=3, do_sample=False, use_cache=False)
        model(**batch)
    assert torch.equal(cached, plain)
    num_layers = len(pruner.statistics.tokens_per_layer)
    for (item,) in pruner.statistics.items:
        counts = pruner.counts(item.num_tokens, num_layers)
        assert counts[0] > counts[-1]
        assert [len(item.kept[layer]) for layer in range(num_layers)] == counts
        assert item.merged_into[0].max() >= 0
