"""Log-probabilities of supervised tokens against log_softmax of all logits: values, and every gradient."""

import pytest
import torch

from mllm.errors import OptionError
from mllm.models import loss as loss_module
from mllm.models.log_probs import supervised_log_probs
from mllm.models.loss import LogitExtras, supervised_loss
from mllm.models.supervised import attach_supervised_forward
from mllm.testing import tiny_model
from mllm.testing_stock import tiny_stock_batch, tiny_stock_model

VOCABULARY, WIDTH = 7, 4
LABELS = torch.tensor([[-100, 3, -100, 6, 0], [-100, -100, -100, -100, 2]])
OWN = torch.tensor([[True, True, False, False, True], [False] * 5])
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


def _written_out(hidden, head, *, extras=EXTRAS["plain"], own=None) -> torch.Tensor:
    """What the position in front of each supervised token gives to it, or to the likeliest other."""
    logits = head(hidden) * extras.scale
    if extras.soft_cap is not None:
        logits = extras.soft_cap * torch.tanh(logits / extras.soft_cap)
    log_probs = torch.log_softmax(logits, dim=-1)
    found = []
    for row, t in (LABELS != -100).nonzero().tolist():
        token = int(LABELS[row, t])
        if own is not None and own[row, t]:
            best, second = logits[row, t - 1].argsort(descending=True)[:2].tolist()
            token = second if best == token else best
        found.append(log_probs[row, t - 1, token])
    return torch.stack(found)


def _gradients(log_probs, *tensors) -> list[torch.Tensor]:
    """Of something that weighs each token otherwise, and no factor of which is known before all are."""
    factors = torch.arange(1, len(log_probs) + 1).to(log_probs)
    return list(torch.autograd.grad((factors * log_probs).sum().sin(), tensors))


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS.keys())
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("own", [None, OWN], ids=["labels", "own tokens"])
@pytest.mark.usefixtures("rows_of_a_chunk")
def test_equal_log_softmax(extras, bias, own):
    hidden, head = _hidden_and_head(bias=bias)
    trained = (hidden, *head.parameters())
    expected = _written_out(hidden, head, extras=extras, own=own)
    found = supervised_log_probs(hidden, LABELS, head, own_tokens=own, extras=extras)
    torch.testing.assert_close(found, expected, **EXACT)
    for one, other in zip(_gradients(found, *trained), _gradients(expected, *trained), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_token_that_is_the_likeliest_gives_its_place_to_the_second():
    """Both cases of `own_tokens` are in `OWN`: the label is the model's first choice, and it is not."""
    hidden, head = _hidden_and_head()
    first = int(head(hidden)[0, 0].argmax())
    for label in range(VOCABULARY):
        labels = torch.full_like(LABELS, -100)
        labels[0, 1] = label
        found = supervised_log_probs(hidden, labels, head, own_tokens=OWN)
        ranked = torch.log_softmax(head(hidden)[0, 0], dim=-1).sort(descending=True).values
        torch.testing.assert_close(found, ranked[1:2] if label == first else ranked[:1], **EXACT)
        assert labels[0, 1] == label  # whoever passed them finds them as they were


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
@pytest.mark.usefixtures("rows_of_a_chunk")
def test_whatever_is_trained_alone_gets_its_gradient(trained):
    hidden, head = _hidden_and_head(bias=True)
    for name, tensor in {"hidden": hidden, "weight": head.weight, "bias": head.bias}.items():
        tensor.requires_grad_(name == trained)
    tensor = {"hidden": hidden, "weight": head.weight, "bias": head.bias}[trained]
    expected = _gradients(_written_out(hidden, head), tensor)
    torch.testing.assert_close(_gradients(supervised_log_probs(hidden, LABELS, head), tensor), expected, **EXACT)


@pytest.mark.usefixtures("rows_of_a_chunk")
def test_their_sum_is_the_loss():
    hidden, head = _hidden_and_head()
    loss = supervised_loss(hidden, LABELS, head, num_items=1).loss
    torch.testing.assert_close(-supervised_log_probs(hidden, LABELS, head).sum(), loss, **EXACT)


@pytest.mark.usefixtures("rows_of_a_chunk")
def test_half_precision_is_summed_in_float32():
    """Values are what float32 logits give of the rounded ones; the gradients have the types of their tensors."""
    hidden, head = _hidden_and_head(dtype=torch.bfloat16)
    found = supervised_log_probs(hidden, LABELS, head)
    places = LABELS[:, 1:] != -100
    exact = head(hidden[:, :-1][places]).double().log_softmax(-1).gather(1, LABELS[:, 1:][places][:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    gradients = _gradients(found, hidden, head.weight)
    assert [one.dtype for one in gradients] == [torch.bfloat16] * 2
    torch.testing.assert_close(gradients, _gradients(exact, hidden, head.weight), rtol=4e-2, atol=4e-2)


@pytest.mark.usefixtures("rows_of_a_chunk")
def test_autocast_multiplies_in_its_type_and_trains_in_the_heads():
    """Also on the way back, where autocast is off: logits that are computed again there are the same."""
    hidden, head = _hidden_and_head(bias=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = supervised_log_probs(hidden, LABELS, head)
        logits = head(hidden[:, :-1][LABELS[:, 1:] != -100])
    expected = logits.float().log_softmax(-1).gather(1, LABELS[:, 1:][LABELS[:, 1:] != -100][:, None])[:, 0]
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    with _Watch() as made:
        gradients = _gradients(found, hidden, *head.parameters())
    assert made.factors == {torch.bfloat16}
    assert {one.dtype for one in gradients} == {torch.float32}
    torch.testing.assert_close(gradients, _gradients(expected, hidden, *head.parameters()), rtol=4e-2, atol=4e-2)


def test_the_way_back_can_be_gone_twice():
    """Nothing that is kept is scaled in place: a loss of many terms may go backward from each."""
    hidden, head = _hidden_and_head()
    found = supervised_log_probs(hidden, LABELS, head)
    once = torch.autograd.grad(found.sum(), (hidden, head.weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), (hidden, head.weight)), once, rtol=0, atol=0)


def test_no_supervised_token_gives_none_with_a_graph():
    hidden, head = _hidden_and_head()
    found = supervised_log_probs(hidden, torch.full_like(LABELS, -100), head)
    found.sum().backward()
    assert len(found) == 0 and hidden.grad.abs().sum() == 0 and head.weight.grad.abs().sum() == 0


def test_without_a_graph_nothing_is_kept():
    hidden, head = _hidden_and_head()
    with torch.no_grad():
        assert not supervised_log_probs(hidden, LABELS, head).requires_grad


def test_a_frozen_head_gets_no_gradient():
    hidden, head = _hidden_and_head()
    head.requires_grad_(False)
    supervised_log_probs(hidden, LABELS, head).sum().backward()
    assert head.weight.grad is None and hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("is_trained", [True, False])
def test_no_tensor_with_the_vocabulary_is_larger_than_a_chunk(monkeypatch, is_trained):
    """Forward and backward, every tensor that any operation makes is looked at; the head's own gradient is smaller."""
    vocabulary, rows = 1000, WIDTH + 1
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": rows * vocabulary * 4})
    hidden = torch.randn(1, 41, WIDTH, requires_grad=True)
    head = torch.nn.Linear(WIDTH, vocabulary, bias=False).requires_grad_(is_trained)
    with _Watch() as made:
        supervised_log_probs(hidden, torch.randint(0, vocabulary, (1, 41)), head).sum().backward()
    assert max(made.sizes) == rows * vocabulary


def test_the_head_is_called_once_whatever_the_chunks(monkeypatch):
    """Hooks that gather sharded weights have to fire equally often on all ranks; and leave with the head as it was."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", {"cpu": 1})
    hidden, head = _hidden_and_head()
    before, calls = dict(head.__dict__), []
    hook = head.register_forward_pre_hook(lambda *_: calls.append(1))
    supervised_log_probs(hidden, LABELS, head).sum().backward()
    hook.remove()
    assert calls == [1] and head.__dict__ == before


def test_a_head_that_is_not_linear_is_refused():
    hidden, head = _hidden_and_head()
    with pytest.raises(OptionError, match="Sequential"):
        supervised_log_probs(hidden, LABELS, torch.nn.Sequential(head))


@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "stock"])
def test_models_give_those_of_their_logits(tmp_path, is_ours):
    """A stock model does with the forward that it is trained with."""
    model = tiny_model(tmp_path)[0].eval() if is_ours else tiny_stock_model("llava")
    text = torch.randint(5, 50, (2, 6))
    batch = {"input_ids": text, "labels": text} if is_ours else tiny_stock_batch(model)
    attach_supervised_forward(model)
    found = model(**batch, returns_log_probs=True, use_cache=False).log_probs
    targets = batch.pop("labels")[:, 1:]
    log_probs = model(**batch).logits[:, :-1].log_softmax(-1)
    expected = log_probs.gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != -100]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the sizes of all tensors made inside, and the types of matrices that are multiplied."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []
        self.factors: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.factors.add(args[-1].dtype)
        self.sizes += [one.numel() for one in (made if isinstance(made, tuple) else (made,)) if torch.is_tensor(one)]
        return made
