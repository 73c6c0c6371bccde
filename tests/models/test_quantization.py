"""QLoRA: 4 bits in the named parts and nowhere else, adapters that outlive them, and what is refused."""

import importlib.util
import shutil

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from mllm import load_model
from mllm.errors import CheckpointError, OptionError
from mllm.load import merged
from mllm.models.parts import (
    PartOptions,
    adapted_modules,
    apply_modes,
    copied_modules,
    four_bit_config,
    four_bit_modules,
    keep_as_loaded,
    linear_modules,
    part_of,
    parts_of,
    quantized_parts,
    summarize_parts,
)
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_stock import STOCK_FAMILIES, tiny_stock_batch, tiny_stock_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*tie_word_embeddings")
QLORA = PartOptions("lora", rank=4, quantize="4bit")
IDS = torch.arange(24).reshape(2, 12) % 400


@pytest.fixture(autouse=True)
def _needs_bitsandbytes(request: pytest.FixtureRequest) -> None:
    if "without_bitsandbytes" not in request.node.name:
        pytest.importorskip("bitsandbytes", reason="the extra `bnb` is not installed")


@pytest.mark.parametrize(
    "parts", [("text",), ("image.encoder",), ("image.connector", "text")], ids=lambda parts: "+".join(parts)
)
def test_only_the_named_parts_are_quantized(assembled, parts):
    plain, model = load_model(assembled), load_model(assembled, quantize=parts)
    expected = {part: linear_modules(plain, parts_of(plain)[part]) for part in parts_of(plain)}
    assert four_bit_modules(model) == sorted(name for part in parts for name in expected[part])
    assert sum(type(module).__name__ == "Linear4bit" for module in model.modules()) == len(four_bit_modules(model))
    weights = dict(model.named_parameters())
    for name, weight in plain.named_parameters():
        if name.removesuffix(".weight") not in four_bit_modules(model) and not name.endswith(".bias"):
            assert torch.equal(weights[name], weight)


def test_half_a_byte_a_weight_with_constants_quantized_too(assembled):
    weight = load_model(assembled, quantize=("text",)).model.language_model.layers[0].mlp.up_proj.weight
    assert weight.numel() * weight.element_size() == 64 * 32 // 2
    assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested


@pytest.mark.parametrize(("given", "compute"), [("auto", torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_products_are_computed_in_the_type_of_the_weights(assembled, given, compute):
    model = load_model(assembled, quantize=("text",), dtype=given)
    assert model.model.language_model.layers[0].mlp.up_proj.compute_dtype == compute


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in ("llava", "qwen3_vl") else pytest.mark.slow)
        for family in STOCK_FAMILIES
    ],
)
def test_of_stock_models_too(family, tmp_path):
    model = tiny_stock_model(family)
    model.save_pretrained(tmp_path)
    config = four_bit_config(model, ("text",), compute_dtype=torch.float32)
    loaded = AutoModelForMultimodalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}
    ).eval()
    keep_as_loaded(loaded)
    assert four_bit_modules(loaded) == sorted(linear_modules(model, parts_of(model)["text"]))
    loss = loaded(**tiny_stock_batch(model)).loss
    assert torch.isfinite(loss) and 0 < abs(loss - model(**tiny_stock_batch(model)).loss) < 0.1


def test_packed_weights_are_counted_whole(assembled):
    options = {"text": QLORA}
    rows = {}
    for quantize in ((), ("text",)):
        model = load_model(assembled, quantize=quantize)
        rows[quantize] = [row.parameters for row in summarize_parts(model, options, learning_rate=1.0)]
    assert rows[()] == rows["text",]


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_learns_on_4_bits_and_leaves_them_alone(assembled, dora):
    options = {"image.connector": PartOptions("full"), "text": PartOptions("lora", rank=4, quantize="4bit", dora=dora)}
    model = apply_modes(load_model(assembled, quantize=quantized_parts(options)), options)
    before = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    losses = _learn(model)
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert len(adapted_modules(model)) == len(four_bit_modules(model)) == 14


def test_evaluating_changes_no_weight(assembled):
    """bitsandbytes would pack weights anew, with rounded constants, at the first call in eval mode on some CPUs."""
    model = load_model(assembled, quantize=("text",))
    first = model.train()(input_ids=IDS).logits
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, first)
    assert torch.equal(model.train()(input_ids=IDS).logits, first)


def test_the_adapter_is_loaded_on_quantized_and_on_unquantized_weights(assembled, train, tmp_path):
    parts = {"image.connector": "full", "text": {"mode": "lora", "rank": 4, "quantize": "4bit"}}
    final = train(tmp_path / "run", parts=parts) / "final"
    quantized, plain = (load_model(final, quantize=quantize).eval() for quantize in (("text",), ()))
    assert four_bit_modules(plain) == [] and adapted_modules(plain) == adapted_modules(quantized)
    logits = plain(input_ids=IDS).logits
    torch.testing.assert_close(quantized(input_ids=IDS).logits, logits, rtol=0, atol=0.5)
    assert not torch.equal(quantized(input_ids=IDS).logits, logits)
    torch.testing.assert_close(merged(plain).eval()(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="held in 4 bits.*cannot be merged"):
        merged(quantized)


def test_a_stock_model_is_trained_on_4_bits_of_two_parts_by_the_program(train, tmp_path):
    base = save_stock_checkpoint(tmp_path / "base", "qwen3_vl")
    parts = {
        "image.encoder": {"mode": "frozen", "quantize": "4bit"},
        "image.connector": {"mode": "full", "checkpointing": False},
        "text": {"mode": "lora", "rank": 4, "layers": "last:2", "quantize": "4bit", "checkpointing": True},
    }
    final = train(tmp_path / "run", model=str(base), parts=parts, optim="adamw_8bit") / "final"
    model, plain = load_model(final), load_model(base)
    assert set(adapted_modules(model)) == {
        name for name in linear_modules(plain, parts_of(plain)["text"]) if ".layers.0." not in name
    }
    before, after = plain.state_dict(), merged(model).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {part_of(name, parts_of(plain).values()) for name in changed} == {"image.connector", "text"}


def test_a_connector_alone_beside_quantized_weights(assembled, tmp_path):
    """Alignment under a language model of 4 bits: what is saved is the connector, not the language model."""
    options = {"image.connector": PartOptions("full"), "text": PartOptions(quantize="4bit")}
    model = apply_modes(load_model(assembled, quantize=("text",)), options)
    model.peft_config["default"].base_model_name_or_path = str(assembled)
    connector = model.get_base_model().model.image_tower.connector
    with torch.no_grad():
        connector.modules_to_save["default"].linear_1.bias.fill_(7.0)
    model.save_pretrained(tmp_path)
    reloaded = load_model(tmp_path)
    assert copied_modules(reloaded) == ["model.image_tower.connector"] and adapted_modules(reloaded) == []
    assert merged(reloaded).model.image_tower.connector.linear_1.bias.eq(7.0).all()


@pytest.mark.parametrize(
    ("quantize", "options", "message"),
    [
        (("text",), {"text": PartOptions("lora")}, "quantized parts: text\nexpected: none"),
        ((), {"text": QLORA}, "quantized parts: none\nexpected: text"),
        ((), {"text": PartOptions("full", quantize="4bit")}, "text = full, and its weights are quantized"),
        ((), {"text": PartOptions("lora", quantize="8bit")}, "quantize = '8bit'"),
        ((), {"text": PartOptions("full"), "image.encoder": QLORA}, "text = full beside a lora part or a quantized"),
        ((), {"text": PartOptions(quantize="4bit")}, "every part is frozen"),
    ],
)
def test_what_is_refused(assembled, quantize, options, message):
    with pytest.raises(OptionError, match=message):
        apply_modes(load_model(assembled, quantize=quantize), options)


def test_an_unknown_part_is_refused(assembled):
    with pytest.raises(OptionError, match="quantize: 'vision'"):
        load_model(assembled, quantize=("vision",))


def test_without_bitsandbytes_it_says_what_to_install(assembled, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(OptionError, match="bitsandbytes is not installed(.|\n)*extra `bnb`"):
        load_model(assembled, quantize=("text",))


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_an_optimizer_with_states_of_8_bits_takes_our_groups_and_resumes(train, tmp_path, assembled, name):
    """States of fewer than 4096 numbers stay in 32 bits; the embedding of the tiny model is larger."""
    run = tmp_path / "run"
    options = {
        "parts": {"image.connector": {"mode": "full", "learning_rate": 1e-3}, "text": "full"},
        "optim": name, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    straight = load_model(train(run, **options) / "final").state_dict()
    before = load_model(assembled).state_dict()
    changed = {key for key, value in straight.items() if not torch.equal(value, before[key])}
    assert "model.image_tower.connector.linear_1.weight" in changed and "lm_head.weight" in changed
    assert not any(".encoder." in key for key in changed)
    states = torch.load(run / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert torch.uint8 in {value.dtype for state in states.values() for value in _tensors(state)}
    for left in ("final", "checkpoint-4"):
        shutil.rmtree(run / left)
    resumed = load_model(train(run, **options) / "final").state_dict()
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())


def _tensors(state: dict) -> list[torch.Tensor]:
    """Of an optimizer's state, which bitsandbytes nests."""
    nested = [value for value in state.values() if isinstance(value, dict)]
    return [value for value in state.values() if isinstance(value, torch.Tensor)] + [
        value for inner in nested for value in _tensors(inner)
    ]


def _learn(model) -> list[float]:
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
