"""Placeholders and features meet: hand-computed."""

import pytest
import torch

from mllm.errors import RowError
from mllm.models.fusion import placeholder_mask, scatter_features


def test_features_take_the_placeholders_in_order_of_appearance():
    ids = torch.tensor([[1, 9, 9, 2], [3, 4, 9, 9]])
    mask = placeholder_mask(ids, 9, num_features=4)
    features = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    filled = scatter_features(torch.zeros(2, 4, 1), mask, features)
    assert filled.squeeze(-1).tolist() == [[0, 1, 2, 0], [0, 0, 3, 4]]


@pytest.mark.parametrize("num_features", [3, 5])
def test_other_numbers_are_refused_with_both_counts(num_features):
    ids = torch.tensor([[1, 9, 9, 2], [3, 4, 9, 9]])
    with pytest.raises(RowError, match=f"4 placeholder tokens .id 9. for {num_features} feature vectors"):
        placeholder_mask(ids, 9, num_features=num_features)
