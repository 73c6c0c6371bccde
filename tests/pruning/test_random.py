"""Tokens by chance: of each picture others, and always the same of the same picture in a run."""

import torch

from mllm.pruning import Random
from mllm.testing_pruning import NUM_TOKENS, tiny_prunable_model


def test_chance_is_one_for_each_picture_in_order_however_they_are_batched(tmp_path):
    model, _ = tiny_prunable_model(tmp_path)
    ids = torch.tensor([[5, *[model.config.image_token_id] * NUM_TOKENS, 6]]).repeat(6, 1)
    pixels = torch.randn(6, 3, 32, 32)
    found = {}
    pruner = Random(tokens=5)
    for size in (1, 2, 6):
        found[size] = []
        with pruner(model), torch.no_grad():
            for rows, images in zip(ids.split(size), pixels.split(size), strict=True):
                model(input_ids=rows, pixel_values=images)
                found[size] += [row[0].kept[0].tolist() for row in pruner.statistics.items]
    assert found[1] == found[2] == found[6]
    assert len({str(kept) for kept in found[1]}) == 6 and all(len(set(kept)) == 5 for kept in found[1])
    with Random(tokens=5, seed=1)(model) as other, torch.no_grad():
        model(input_ids=ids[:1], pixel_values=pixels[:1])
    assert other.statistics.items[0][0].kept[0].tolist() != found[1][0]
