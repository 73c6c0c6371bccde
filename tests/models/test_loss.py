"""The loss against the formula written out in float64."""

import pytest
import torch

from mllm.models.loss import supervised_loss


@pytest.fixture
def batch():
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(4, 7, bias=False).double()
    labels = torch.tensor([[-100, 3, -100, 6, 0], [-100, -100, -100, -100, 2]])
    return hidden, labels, head


def _reference(hidden, labels, head, weights):
    """One term per supervised token: the log-probability that the position in front of it gives to it."""
    total = 0.0
    for row in range(2):
        for t in range(1, 5):
            if labels[row, t] != -100:
                probabilities = torch.softmax(head(hidden[row, t - 1]), dim=-1)
                total = total - weights[row, t] * torch.log(probabilities[labels[row, t]])
    return total


# `.float()` inside is for half precision; in float64 it costs digits, so the comparison is at float32's precision.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def test_mean_over_supervised_tokens(batch):
    hidden, labels, head = batch
    expected = _reference(hidden, labels, head, torch.ones(2, 5)) / 4
    torch.testing.assert_close(supervised_loss(hidden, labels, head).double(), expected, **TOLERANCE)


def test_given_divisor_and_weights(batch):
    hidden, labels, head = batch
    weights = torch.tensor([[1.0, 0.5, 1, 2, 1], [1, 1, 1, 1, 0.25]])
    expected = _reference(hidden, labels, head, weights) / 10
    found = supervised_loss(hidden, labels, head, loss_weights=weights, num_items=torch.tensor(10))
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


def test_no_supervised_token_gives_zero_with_a_graph(batch):
    hidden, labels, head = batch
    loss = supervised_loss(hidden, torch.full_like(labels, -100), head)
    loss.backward()
    assert loss.item() == 0.0 and hidden.grad.abs().sum() == 0
