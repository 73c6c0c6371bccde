"""A rank without media: it calls what ranks with media call, in their order, and changes nothing by it."""

import pytest
import torch

from mllm.models import joining
from mllm.models.supervised import attach_supervised_forward
from mllm.processing import StockProcessor
from mllm.processing.blank import blank_media
from mllm.testing_checkpoints import stock_processor, stock_tokenizer
from mllm.testing_stock import STOCK_FAMILIES, tiny_stock_batch, tiny_stock_model

TEXT = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")


@pytest.fixture(params=STOCK_FAMILIES)
def model(request):
    return tiny_stock_model(request.param)


@pytest.fixture
def together(monkeypatch):
    """As if this process were one of several."""
    monkeypatch.setattr(joining, "is_called_together", lambda module, training: True)


def _blank(model) -> dict[str, torch.Tensor]:
    batch = tiny_stock_batch(model, num_rows=1)
    # Ones: Idefics 3 takes an image of zeros for padding, and leaves it out.
    return {
        name: torch.ones_like(value) if value.is_floating_point() else value
        for name, value in batch.items()
        if name not in TEXT
    }


def _calls(model, batch) -> list[str]:
    """Names of the innermost modules in the order they are called."""
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.usefixtures("together")
def test_nothing_changes(model):
    """Neither the loss nor a gradient; what was out of reach has one of zero."""
    batch, trained = tiny_stock_batch(model, media=False), [one for one in model.parameters() if one.requires_grad]
    runs = []
    for blank in (None, _blank(model)):
        model.__dict__.pop("forward", None)
        attach_supervised_forward(model, blank=blank)
        loss = model(**batch, use_cache=False).loss
        runs.append((loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)))
    assert torch.equal(runs[0][0], runs[1][0])
    for before, after in zip(runs[0][1], runs[1][1], strict=True):
        assert before is not None or after is None or not after.any()
        assert before is None or torch.equal(before, after)


@pytest.mark.usefixtures("together")
def test_every_parameter_that_media_reach_is_reached(model):
    attach_supervised_forward(model, blank=_blank(model))
    trained = [one for one in model.parameters() if one.requires_grad]
    reached = []
    for media in (True, False):
        loss = model(**tiny_stock_batch(model, num_rows=1, media=media), use_cache=False).loss
        reached.append([one is not None for one in torch.autograd.grad(loss, trained, allow_unused=True)])
    assert reached[0] == reached[1]


@pytest.mark.usefixtures("together")
def test_modules_are_called_in_the_order_of_a_rank_with_media(model):
    attach_supervised_forward(model, blank=_blank(model))
    with_media, without = (_calls(model, tiny_stock_batch(model, num_rows=1, media=media)) for media in (True, False))
    assert with_media == without


def test_alone_no_medium_is_made_up(model):
    attach_supervised_forward(model, blank=_blank(model))
    calls = _calls(model, tiny_stock_batch(model, media=False))
    decoder = next(name for name, module in model.named_modules() if module is model.model.get_decoder())
    assert calls and all(name.startswith((decoder, "lm_head")) for name in calls)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "idefics3", "gemma3", "qwen2_audio"])
def test_a_processors_blank_is_what_its_model_takes(family):
    processor = StockProcessor(stock_processor(family, stock_tokenizer(family)))
    names = set(tiny_stock_batch(tiny_stock_model(family))) - set(TEXT)
    assert names <= set(blank_media(processor)) and len(names)
