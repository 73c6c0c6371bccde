"""Activation checkpointing by part: the same gradients, fewer activations, and only where it was asked for."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn

from mllm.errors import OptionError
from mllm.models.parts import PartOptions, apply_modes, checkpoint_parts, layers_of, parts_of
from mllm.testing import tiny_model
from mllm.testing_stock import STOCK_FAMILIES, tiny_stock_batch, tiny_stock_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*tie_word_embeddings")
FULL = PartOptions("full", checkpointing=True)
LORA = PartOptions("lora", rank=4, dropout=0.2, checkpointing=True)


FAST = ("composed", "qwen3_vl", "qwen2_audio")


@pytest.fixture(
    params=[
        pytest.param(family, marks=() if family in FAST else pytest.mark.slow)
        for family in ("composed", *STOCK_FAMILIES)
    ]
)
def made(request, tmp_path):
    """Makes the same model and batch again and again; dropout is alive in the language model."""
    if request.param == "composed":
        return lambda: _composed(tmp_path)
    return lambda: _stock(request.param)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("modes", ["full", "lora", "encoder full beside lora", "upper layers"])
def test_gradients_are_equal_with_and_without(made, modes, reentrant):
    """Dropout included: the random numbers of the recomputation are those of the forward."""
    media = "audio" if "audio.encoder" in parts_of(made()[0]) else "image"
    options = {
        "full": {f"{media}.encoder": FULL, "text": FULL},
        "lora": {f"{media}.encoder": LORA, "text": LORA},
        "encoder full beside lora": {f"{media}.encoder": FULL, "text": LORA},
        "upper layers": {
            f"{media}.encoder": replace(FULL, layers="last:1"),
            "text": replace(LORA, layers="last:1"),
        },
    }[modes]
    plain, _ = _gradients(*made(), options, checkpointing=False)
    found, calls = _gradients(*made(), options, checkpointing=True, reentrant=reentrant)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name
    if modes != "upper layers":  # what is below them keeps nothing, and is not computed again
        assert set(calls.values()) == {2}, "nothing was computed again"


def test_only_the_part_that_asks(made):
    model, batch = made()
    media = "audio" if "audio.encoder" in parts_of(model) else "image"
    options = {f"{media}.encoder": PartOptions("full"), "text": LORA}
    encoder, text = (layers_of(model, parts_of(model)[name]) for name in (f"{media}.encoder", "text"))
    _, calls = _gradients(model, batch, options, checkpointing=True)
    assert {calls[name] for name in encoder} == {1} and {calls[name] for name in text} == {2}


def test_a_frozen_encoder_is_run_once_and_keeps_no_graph(made):
    """Whatever asks for gradients of its inputs."""
    model, batch = made()
    media = "audio" if "audio.encoder" in parts_of(model) else "image"
    layers = layers_of(model, parts_of(model)[f"{media}.encoder"])
    options = {f"{media}.encoder": PartOptions(checkpointing=True), "text": LORA}
    model.enable_input_require_grads()
    outputs = []
    model.get_submodule(layers[-1]).register_forward_hook(lambda module, args, output: outputs.append(output))
    _, calls = _gradients(model, batch, options, checkpointing=True)
    assert {calls[name] for name in layers} == {1}
    tensors = [output if isinstance(output, torch.Tensor) else output[0] for output in outputs]
    assert len(tensors) == 1 and tensors[0].grad_fn is None


def test_run_wide_checkpointing_means_all_parts(made):
    """`gradient_checkpointing` of transformers' arguments, which calls this."""
    model, batch = made()
    media = "audio" if "audio.encoder" in parts_of(model) else "image"
    model.gradient_checkpointing_enable()
    _, calls = _gradients(model, batch, {f"{media}.encoder": PartOptions("full"), "text": PartOptions("full")})
    assert set(calls.values()) == {2}


def test_a_part_without_layers_is_refused(tmp_path):
    model, _ = _composed(tmp_path)
    options = {"image.connector": FULL}
    with pytest.raises(OptionError, match="image.connector: checkpointing, and the part has no layers"):
        checkpoint_parts(apply_modes(model, options), options)


def _composed(directory) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = tiny_model(directory, attention_dropout=0.3)[0]
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 300, (2, 14), generator=generator)
    input_ids[:, 2:6] = model.config.image_config.placeholder_token_id
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    return model, {"input_ids": input_ids, "labels": input_ids.clone(), "pixel_values": pixels}


def _stock(family: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = tiny_stock_model(family)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model, tiny_stock_batch(model)


def _gradients(
    model: nn.Module, batch: dict, options: dict, *, checkpointing: bool = False, reentrant: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Gradients of one step by name, and how often each layer of encoder and language model was computed."""
    parts = parts_of(model)
    layers = [name for part in parts.values() if "connector" not in part.name for name in layers_of(model, part)]
    trained = apply_modes(model, options)
    if checkpointing:
        checkpoint_parts(trained, options, reentrant=reentrant)
    plain = trained.get_base_model() if isinstance(trained, PeftModel) else trained
    calls = dict.fromkeys(layers, 0)

    def count(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            calls[name] += 1

        return hook

    for name in layers:
        # A norm inside the layer: the layer itself is called once, what is inside is called again.
        inside = plain.get_submodule(name)
        norms = [module for path, module in inside.named_modules() if "norm" in path and "original" not in path]
        norms[0].register_forward_pre_hook(count(name))
    torch.manual_seed(5)
    trained.train()(**batch).loss.backward()
    return {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}, calls
