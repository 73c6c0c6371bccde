"""The forward that stock models are trained with: the loss of the class itself, and no trace afterwards."""

import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

from mllm.errors import OptionError, RowError
from mllm.models.supervised import (
    LOGIT_EXTRAS,
    attach_supervised_forward,
    detach_supervised_forward,
    is_supervised,
)
from mllm.testing import tiny_model
from mllm.testing_stock import STOCK_FAMILIES, tiny_stock_batch, tiny_stock_model

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def _text(model_type: str | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        **({"model_type": model_type} if model_type else {}), **fields,
    }  # fmt: skip


def _vision(model_type: str, width: int = 32) -> dict[str, Any]:
    return {
        "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 16, "patch_size": 8, "model_type": model_type,
    }  # fmt: skip


QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# Families beyond those of `tiny_stock_model`, as (model type, config). Each scale and cap is strong enough to be seen.
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("paligemma", {
        "text_config": _text("gemma2", final_logit_softcapping=0.05),
        "vision_config": _vision("siglip_vision_model"), "projection_dim": 32,
    }),
    ("granite4_vision", {
        "text_config": _text(logits_scaling=0.01), "vision_config": _vision("siglip_vision_model", 64),
        "deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "1/2",
    }),
    ("cohere_compass", {
        "text_config": _text(logit_scale=16.0, rope_parameters=dict.fromkeys(
            ("full_attention", "sliding_attention"), ROPE
        )),
        "vision_config": {
            **QWEN_VISION, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    }),
    ("llava_next", {
        "text_config": _text("granite", logits_scaling=0.01), "vision_config": _vision("clip_vision_model"),
    }),
    ("cohere2_vision", {
        "text_config": _text("cohere2", logit_scale=16.0), "vision_config": _vision("siglip_vision_model"),
    }),
    ("aya_vision", {
        "text_config": _text("cohere2", logit_scale=16.0), "vision_config": _vision("siglip_vision_model"),
    }),
    ("mistral3", {"text_config": _text("mistral"), "vision_config": _vision("pixtral")}),
    ("vipllava", {"text_config": _text("llama"), "vision_config": _vision("clip_vision_model")}),
    ("lfm2_vl", {"text_config": _text("lfm2"), "vision_config": _vision("siglip2_vision_model")}),
    ("qwen2_vl", {
        "text_config": _text(rope_parameters={**ROPE, "mrope_section": [1, 1, 2]}),
        "vision_config": {**QWEN_VISION, "embed_dim": 32},
    }),
]  # fmt: skip


def _other(family: str, config: dict[str, Any]) -> PreTrainedModel:
    return AutoModelForMultimodalLM.from_config(AutoConfig.for_model(family, **config)).eval()


def _text_batch() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, 50, (2, 7))
    labels = input_ids.clone()
    labels[:, :3] = -100
    return {"input_ids": input_ids, "labels": labels}


def _loss_and_gradients(model, batch) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(**batch, use_cache=False).loss
    return loss.detach(), list(torch.autograd.grad(loss, trained, allow_unused=True))


def _assert_equals_its_class(model, batch) -> None:
    expected = _loss_and_gradients(model, batch)
    attach_supervised_forward(model)
    assert is_supervised(model)
    found = _loss_and_gradients(model, batch)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", STOCK_FAMILIES)
def test_equals_the_loss_of_the_class(family):
    """With media, rows of unequal length, in training mode; loss and all gradients."""
    model = tiny_stock_model(family).train()
    _assert_equals_its_class(model, tiny_stock_batch(model))


@pytest.mark.parametrize(("family", "config"), OTHERS, ids=[family for family, _ in OTHERS])
def test_scales_and_caps_equal_those_of_the_class(family, config):
    _assert_equals_its_class(_other(family, config), _text_batch())


@pytest.mark.parametrize(("family", "config"), OTHERS, ids=[family for family, _ in OTHERS])
def test_log_probs_are_scaled_and_capped_as_those_of_the_class(family, config):
    model, batch = _other(family, config), _text_batch()
    expected = model(**batch, use_cache=False).loss
    attach_supervised_forward(model)
    found = model(**batch, use_cache=False, returns_log_probs=True).log_probs
    torch.testing.assert_close(-found.mean(), expected, **CLOSE)


def test_every_entry_of_the_table_is_compared():
    assert {*STOCK_FAMILIES, *(family for family, _ in OTHERS)} == set(LOGIT_EXTRAS)


def test_head_bias_equals_that_of_the_class():
    model = tiny_stock_model("llava")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features))
    _assert_equals_its_class(model, tiny_stock_batch(model))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_number_of_items_divides_and_goes_no_further(family):
    """Also of a class that hides the count from a trainer: `accepts_loss_kwargs = False`."""
    model = tiny_stock_model(family)
    attach_supervised_forward(model)
    batch, seen = tiny_stock_batch(model), []
    handle = model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    own = model(**batch, use_cache=False)
    weighted = model(
        **batch, use_cache=False, num_items_in_batch=7, loss_weights=torch.full(batch["labels"].shape, 0.5)
    )
    handle.remove()
    torch.testing.assert_close(weighted.loss * 7 * 2, own.loss * len(own.token_losses))
    assert not any({"labels", "loss_weights", "num_items_in_batch"} & kwargs.keys() for kwargs in seen)


def test_under_peft():
    model = tiny_stock_model("llava")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    batch = tiny_stock_batch(model)
    expected = _loss_and_gradients(adapted, batch)
    attach_supervised_forward(adapted)
    assert is_supervised(model)
    torch.testing.assert_close(_loss_and_gradients(adapted, batch), expected, **CLOSE)


def test_without_labels_and_afterwards_it_is_the_stock_forward(tmp_path):
    model = tiny_stock_model("llava")
    batch = {name: value for name, value in tiny_stock_batch(model).items() if name != "labels"}
    before, signature = model(**batch).logits, inspect.signature(model.forward)
    generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
    attach_supervised_forward(model)
    assert torch.equal(model(**batch).logits, before) and inspect.signature(model.forward) == signature
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), generated)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(**batch).logits, before)
    detach_supervised_forward(model)
    assert "forward" not in model.__dict__
    assert torch.equal(model(**batch).logits, before)


def test_ours_has_such_a_forward_already(tmp_path):
    model, _ = tiny_model(tmp_path)
    attach_supervised_forward(model)
    detach_supervised_forward(model)
    assert "forward" not in model.__dict__


def test_a_class_that_nobody_has_read_is_refused():
    model = tiny_stock_model("llava")
    model.config.model_type = "chameleon"
    with pytest.raises(OptionError, match="chameleon"):
        attach_supervised_forward(model)


def test_hidden_states_of_another_length_than_the_labels_are_an_error():
    model = tiny_stock_model("llava")
    attach_supervised_forward(model)
    batch = tiny_stock_batch(model, media=False)
    with pytest.raises(RowError, match="3 labels"):
        model(input_ids=batch["input_ids"], labels=batch["labels"][:, :3])
