"""Arithmetic foretold from counts of tokens is what torch's counter counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm.pruning import Random, Uniform
from mllm.pruning.anatomy import anatomy_of
from mllm.pruning.flops import planned_tokens, prefill_flops, text_sizes
from mllm.testing import tiny_model
from mllm.testing_stock import tiny_stock_batch, tiny_stock_config, tiny_stock_model


def counted_in_text(model, inputs):
    """What the language model and its head compute."""
    model.set_attn_implementation("eager")  # torch's counter knows no attention kernel of the CPU
    anatomy = anatomy_of(model)
    seen = []
    with FlopCounterMode(display=False) as counter:
        handle = anatomy.body.register_forward_pre_hook(
            lambda *_: seen.append(counter.get_total_flops()), prepend=True
        )
        model(**inputs, logits_to_keep=1)
        handle.remove()
        return counter.get_total_flops() - seen[0]


def one_row(model):
    batch = tiny_stock_batch(model, num_rows=2)
    return {name: values[:1] for name, values in batch.items() if name != "labels"}


@pytest.mark.parametrize("tokens", [1, 3, None])
def test_foretold_is_what_is_counted(tokens):
    model = tiny_stock_model("llava")
    inputs = one_row(model)
    num_text = inputs["input_ids"].shape[1] - 4
    sizes = text_sizes(model)
    pruner = None if tokens is None else Uniform(tokens=tokens)
    planned = planned_tokens(pruner, items=[4], num_text=num_text, num_layers=len(sizes.layer_weights))
    assert planned == [num_text + (4 if tokens is None else tokens)] * 2
    if pruner is None:
        assert counted_in_text(model, inputs) == prefill_flops(sizes, planned)
        return
    with pruner(model):
        assert counted_in_text(model, inputs) == prefill_flops(sizes, planned)


def test_heads_may_be_wider_than_the_model():
    text = tiny_stock_config("llava").text_config.to_dict()
    model = tiny_stock_model("llava", text_config={**text, "head_dim": 2 * text["head_dim"]})
    inputs = one_row(model)
    assert counted_in_text(model, inputs) == prefill_flops(text_sizes(model), [inputs["input_ids"].shape[1]] * 2)


def test_it_is_so_for_a_composed_model(tmp_path):
    model, _ = tiny_model(tmp_path, llm="qwen3", num_hidden_layers=3)
    side = model.config.image_config.media_rule.image_size
    image = torch.full((1, 4), model.config.image_token_id)
    inputs = {
        "input_ids": torch.cat([torch.arange(3)[None], image, torch.arange(5)[None]], dim=1),
        "attention_mask": torch.ones(1, 12, dtype=torch.long),
        "pixel_values": torch.zeros(1, 3, side, side),
    }
    assert counted_in_text(model, inputs) == prefill_flops(text_sizes(model), [12] * 3)


def test_items_have_budgets_of_their_own():
    assert planned_tokens(Random(tokens=0.5), items=[4, 10], num_text=7, num_layers=3) == [7 + 2 + 5] * 3
    assert planned_tokens(Random(tokens=5), items=[4, 10], num_text=7, num_layers=1) == [7 + 4 + 5]
    assert planned_tokens(None, items=[4, 10], num_text=7, num_layers=2) == [21] * 2
