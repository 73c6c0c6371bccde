"""The loss against its formula written out in float64, in one chunk and in many."""

import pytest
import torch
from torch.nn import functional

from mllm.errors import OptionError
from mllm.models import loss as loss_module
from mllm.models.loss import LogitExtras, supervised_loss

VOCABULARY, WIDTH = 7, 4
LABELS = torch.tensor([[-100, 3, -100, 6, 0], [-100, -100, -100, -100, 2]])
WEIGHTS = torch.tensor([[1.0, 0.5, 1, 2, 1], [1, 1, 1, 1, 0.25]], dtype=torch.float64)
EXTRAS = {
    "plain": LogitExtras(),
    "scaled": LogitExtras(scale=0.125),
    "capped": LogitExtras(soft_cap=0.7),
    "scaled and capped": LogitExtras(scale=3.0, soft_cap=1.5),
}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(params=[None, 2, 1], ids=["one chunk", "chunks of two", "chunks of one"])
def rows_of_a_chunk(request, monkeypatch):
    if request.param is not None:
        size = torch.float64.itemsize
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": request.param * VOCABULARY * size})


def _hidden_and_head(*, bias: bool = False, dtype: torch.dtype = torch.float64):
    hidden = torch.randn(2, 5, WIDTH, dtype=dtype, requires_grad=True)
    return hidden, torch.nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)


def _written_out(hidden, labels, head, weights, extras) -> torch.Tensor:
    """One term per supervised token: the log-probability that the position in front of it gives to it."""
    terms = []
    for row in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[row, t] != -100:
                logits = head(hidden[row, t - 1]) * extras.scale
                if extras.soft_cap is not None:
                    logits = extras.soft_cap * torch.tanh(logits / extras.soft_cap)
                terms.append(-weights[row, t] * torch.log_softmax(logits, dim=-1)[labels[row, t]])
    return torch.stack(terms)


def _gradients(loss, *tensors) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
@pytest.mark.usefixtures("rows_of_a_chunk")
def test_equals_the_formula(extras, bias, weights):
    """Loss, losses of the tokens, and the gradients of all that can be trained."""
    hidden, head = _hidden_and_head(bias=bias)
    trained = (hidden, *head.parameters())
    terms = _written_out(hidden, LABELS, head, torch.ones(2, 5) if weights is None else weights, extras)
    expected = _gradients(terms.sum() / 10, *trained)
    found = supervised_loss(hidden, LABELS, head, loss_weights=weights, num_items=torch.tensor(10), extras=extras)
    torch.testing.assert_close(found.token_losses, terms.detach(), **EXACT)
    torch.testing.assert_close(found.loss, terms.sum() / 10, **EXACT)
    for one, other in zip(_gradients(found.loss, *trained), expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.usefixtures("rows_of_a_chunk")
def test_without_a_divisor_it_is_the_mean():
    hidden, head = _hidden_and_head()
    expected = _written_out(hidden, LABELS, head, torch.ones(2, 5), LogitExtras()).mean()
    torch.testing.assert_close(supervised_loss(hidden, LABELS, head).loss, expected, **EXACT)


@pytest.mark.usefixtures("rows_of_a_chunk")
def test_half_precision_is_summed_in_float32():
    """The loss is what float32 logits give of the rounded ones; the gradients have the types of their tensors."""
    hidden, head = _hidden_and_head(dtype=torch.bfloat16)
    exact = head(hidden[:, :-1])[LABELS[:, 1:] != -100].double()
    expected = functional.cross_entropy(exact, LABELS[:, 1:][LABELS[:, 1:] != -100])
    found = supervised_loss(hidden, LABELS, head)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert [gradient.dtype for gradient in _gradients(found.loss, hidden, head.weight)] == [torch.bfloat16] * 2


@pytest.mark.usefixtures("rows_of_a_chunk")
def test_autocast_multiplies_in_its_type_and_trains_in_the_heads():
    hidden, head = _hidden_and_head(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = supervised_loss(hidden, LABELS, head).loss
        logits = head(hidden[:, :-1][LABELS[:, 1:] != -100])
    expected = functional.cross_entropy(logits.float(), LABELS[:, 1:][LABELS[:, 1:] != -100])
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    one, other = (_gradients(loss, hidden, head.weight) for loss in (found, expected))
    torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)  # bfloat16 has 8 bits


def test_no_supervised_token_gives_zero_with_a_graph():
    hidden, head = _hidden_and_head()
    found = supervised_loss(hidden, torch.full_like(LABELS, -100), head)
    found.loss.backward()
    assert found.loss.item() == 0.0 and len(found.token_losses) == 0
    assert hidden.grad.abs().sum() == 0 and head.weight.grad.abs().sum() == 0


def test_a_frozen_head_gets_no_gradient():
    hidden, head = _hidden_and_head()
    head.requires_grad_(False)
    supervised_loss(hidden, LABELS, head).loss.backward()
    assert head.weight.grad is None and hidden.grad.abs().sum() > 0


def test_without_a_graph_nothing_is_kept():
    hidden, head = _hidden_and_head()
    with torch.no_grad():
        found = supervised_loss(hidden, LABELS, head)
    assert not found.loss.requires_grad and not found.token_losses.requires_grad


@pytest.mark.parametrize("is_trained", [True, False])
def test_no_tensor_with_the_vocabulary_is_larger_than_a_chunk(monkeypatch, is_trained):
    """Forward and backward, every tensor that any operation makes is looked at; the head's own gradient is smaller."""
    vocabulary, rows = 1000, WIDTH + 1
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": rows * vocabulary * 4})
    hidden = torch.randn(1, 41, WIDTH, requires_grad=True)
    head = torch.nn.Linear(WIDTH, vocabulary, bias=False).requires_grad_(is_trained)
    with _Watch() as made:
        supervised_loss(hidden, torch.randint(0, vocabulary, (1, 41)), head).loss.backward()
    assert max(made.sizes) == rows * vocabulary


def test_the_head_is_called_once_whatever_the_chunks(monkeypatch):
    """Hooks that gather sharded weights have to fire equally often on all ranks; and leave with the head as it was."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 1})
    hidden, head = _hidden_and_head()
    before, calls = dict(head.__dict__), []
    hook = head.register_forward_pre_hook(lambda *_: calls.append(1))
    supervised_loss(hidden, LABELS, head).loss.backward()
    hook.remove()
    assert calls == [1] and head.__dict__ == before


def test_a_head_that_is_not_linear_is_refused():
    hidden, head = _hidden_and_head()
    with pytest.raises(OptionError, match="Sequential"):
        supervised_loss(hidden, LABELS, torch.nn.Sequential(head))


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the sizes of all tensors made inside."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.sizes += [one.numel() for one in (made if isinstance(made, tuple) else (made,)) if torch.is_tensor(one)]
        return made
