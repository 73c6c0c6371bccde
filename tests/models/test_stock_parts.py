"""Parts of stock models: every parameter in one of them, frozen ones stay equal, trained ones change."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMultimodalLM

from mllm.errors import OptionError
from mllm.models.parts import (
    PartOptions,
    apply_modes,
    learning_rate_groups,
    linear_modules,
    own_modules,
    part_of,
    parts_of,
    summarize_parts,
)
from mllm.models.stock_parts import STOCK_PARTS
from mllm.testing import tiny_llm
from mllm.testing_stock import STOCK_FAMILIES, tiny_stock_batch, tiny_stock_model

FULL, FROZEN, LORA = PartOptions("full"), PartOptions(), PartOptions("lora", rank=4)
WITHOUT_LINEAR = ("gemma3",)
"""Families whose connector is a bare matrix, which cannot carry an adapter."""

families = pytest.mark.parametrize("family", STOCK_FAMILIES)
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")


def test_the_table_knows_what_the_tests_make():
    assert set(STOCK_PARTS) == set(STOCK_FAMILIES)


@families
def test_every_parameter_belongs_to_one_part(family):
    model = tiny_stock_model(family)
    parts = parts_of(model)
    media = "audio" if family == "qwen2_audio" else "image"
    assert list(parts) == [f"{media}.encoder", f"{media}.connector", "text"]
    found = {part_of(name, parts.values()) for name, _ in model.named_parameters()}
    assert found == set(parts)
    # The modules of a part hold its parameters and no others; what is left stands alone beside modules.
    owned = {name: _below(model, own_modules(model, part)) for name, part in parts.items()}
    for name, _ in model.named_parameters():
        holders = [part for part, names in owned.items() if name in names]
        assert holders == [part_of(name, parts.values())] or name == "model.image_newline"


@families
def test_the_unused_are_those_without_a_gradient(family):
    model = tiny_stock_model(family).train()
    model(**tiny_stock_batch(model)).loss.backward()
    unused = tuple(prefix for part in parts_of(model).values() for prefix in part.unused)
    parameters = dict(model.named_parameters())
    assert {name for name in parameters if name.startswith(unused or ("\0",))} == {
        name for name, parameter in parameters.items() if parameter.grad is None
    }
    assert all(parameter.grad.any() for parameter in parameters.values() if parameter.grad is not None)


def test_layers_above_the_feature_layer_are_unused():
    """LLaVA-1.5 reads the last layer but one."""
    model = tiny_stock_model("llava", vision_feature_layer=[-3, 1])
    unused = parts_of(model)["image.encoder"].unused
    assert [prefix for prefix in unused if ".layers." in prefix] == [
        "model.vision_tower.encoder.layers.1.",
        "model.vision_tower.encoder.layers.2.",
    ]


RUNS = {
    "connector full": lambda media: {f"{media}.connector": FULL},
    "all full": lambda media: {f"{media}.encoder": FULL, f"{media}.connector": FULL, "text": FULL},
    "text lora, connector full": lambda media: {f"{media}.connector": FULL, "text": LORA},
    "encoder full beside lora": lambda media: {f"{media}.encoder": FULL, "text": LORA},
    "encoder lora": lambda media: {f"{media}.encoder": LORA},
    "all lora": lambda media: {f"{media}.encoder": LORA, f"{media}.connector": LORA, "text": LORA},
    "text dora": lambda media: {"text": PartOptions("lora", rank=4, dora=True)},
    "two layers": lambda media: {
        f"{media}.encoder": PartOptions("full", layers="1:2"),
        "text": PartOptions("full", layers="last:1"),
    },
    "a layer full beside a layer's lora": lambda media: {
        f"{media}.encoder": PartOptions("full", layers=":1"),
        "text": PartOptions("lora", layers="-1:"),
    },
}


def _pairs() -> list:
    """Every run on one family and one run on every family in the fast tier, the full product beside it."""
    return [
        pytest.param(
            family, run, marks=() if family == "qwen2_5_vl" or run == "text lora, connector full" else pytest.mark.slow
        )
        for family in STOCK_FAMILIES
        for run in RUNS
    ]


@pytest.mark.parametrize(("family", "run"), _pairs())
def test_trained_changed_and_frozen_did_not(family, run):
    model = tiny_stock_model(family)
    options = _options(model, RUNS[run])
    reference = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    parts, batch = parts_of(model), tiny_stock_batch(model)
    expected = _expected(model, options)
    before = model.eval()(**batch).loss
    trained = apply_modes(model, options)
    assert torch.equal(trained.eval()(**batch).loss, before), "wrapping changed the model"
    _step(trained, options, batch)
    plain = trained.merge_and_unload() if isinstance(trained, PeftModel) else trained
    after = plain.state_dict()
    assert after.keys() == reference.keys()
    tied = {"lm_head.weight"} if "lm_head.weight" not in dict(plain.named_parameters()) else set()
    changed = {name for name in reference if not torch.equal(reference[name], after[name])} - tied
    assert changed == expected
    assert {part_of(name, parts.values()) for name in changed} == set(options)


@families
def test_the_summary_and_the_groups_know_every_part(family):
    model = tiny_stock_model(family)
    media = "audio" if family == "qwen2_audio" else "image"
    options = {f"{media}.connector": PartOptions("full", learning_rate=1e-3), "text": LORA}
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = apply_modes(model, options)
    rows = {row.name: row for row in summarize_parts(trained, options, learning_rate=1e-5)}
    assert sum(row.parameters for row in rows.values()) == total
    assert rows["text"].adapted == len(linear_modules(tiny_stock_model(family), parts_of(model)["text"]))
    assert rows[f"{media}.encoder"].trainable == 0
    groups = learning_rate_groups(trained, options, learning_rate=1e-5, weight_decay=0.1)
    rates = {group["name"].split("/")[0]: group["lr"] for group in groups}
    assert rates == {f"{media}.connector": 1e-3, "text": 1e-5}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in trained.parameters())


@families
def test_a_saved_adapter_is_the_model_that_was_trained(family, tmp_path):
    """Copies of blocks and mergers included; and the base model is found unchanged below it."""
    model = tiny_stock_model(family)
    model.save_pretrained(tmp_path / "base")
    media = "audio" if family == "qwen2_audio" else "image"
    options = {
        f"{media}.encoder": PartOptions("full", layers="last:1"),
        f"{media}.connector": FULL,
        "text": PartOptions("lora", rank=2),
    }
    batch = tiny_stock_batch(model)
    trained = apply_modes(model, options)
    _step(trained, options, batch)
    trained.save_pretrained(tmp_path / "adapter")
    base = AutoModelForMultimodalLM.from_pretrained(tmp_path / "base")
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    logits = trained.eval()(**batch).logits
    assert torch.equal(reloaded.eval()(**batch).logits, logits)
    with reloaded.disable_adapter():
        assert torch.equal(reloaded(**batch).logits, tiny_stock_model(family)(**batch).logits)


@families
def test_a_frozen_encoder_stays_in_eval_mode_and_keeps_no_graph(family):
    """Also where something asks for gradients of its inputs, as adapters beside checkpointing do."""
    model = tiny_stock_model(family)
    media = "audio" if family == "qwen2_audio" else "image"
    names = set(model.state_dict())
    options = {f"{media}.connector": FULL, "text": LORA}
    modules = own_modules(model, parts_of(model)[f"{media}.encoder"])
    trained = apply_modes(model, options).train()
    plain = trained.get_base_model()
    assert set(tiny_stock_model(family).state_dict()) == names
    plain.enable_input_require_grads()
    seen = {}
    for name in modules:
        plain.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: (module.training, _has_graph(output))})
        )
    trained(**tiny_stock_batch(plain)).loss.backward()
    assert seen.keys() == set(modules)
    # Hooks run in the order of registration, so no gradient can have been asked for in between.
    assert set(seen.values()) == {(False, False)}
    assert torch.is_grad_enabled()


def test_a_trained_encoder_is_let_go():
    model = tiny_stock_model("llava")
    apply_modes(model, {"image.connector": FULL})
    apply_modes(model, {"image.encoder": FULL})
    model.train()(**tiny_stock_batch(model)).loss.backward()
    assert model.model.vision_tower.training
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.any()


def test_layers_above_those_that_are_trained_are_let_go():
    model = tiny_stock_model("qwen2_5_vl")
    apply_modes(model, {"image.connector": FULL})
    apply_modes(model, {"image.encoder": PartOptions("full", layers=":1")})
    model.train()(**tiny_stock_batch(model)).loss.backward()
    assert model.model.visual.blocks[0].attn.qkv.weight.grad.any()


def test_an_error_in_a_frozen_encoder_leaves_gradients_enabled():
    model = apply_modes(tiny_stock_model("llava"), {"text": FULL})
    batch = tiny_stock_batch(model)
    with pytest.raises((RuntimeError, ValueError)):
        model(**batch | {"pixel_values": batch["pixel_values"][:, :1]})
    assert torch.is_grad_enabled()
    model.train()(**batch).loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image.encoder": PartOptions("full", layers="5:9")}, r"its layers are model.visual.blocks.0 to .*blocks.1"),
        ({"image.encoder": PartOptions("full", layers="last:3")}, r"expected: a range within 0:2"),
        ({"image.encoder": PartOptions("lora", layers="1:1")}, r"a range within 0:2"),
        ({"image.encoder": PartOptions("full", layers="12")}, r"layers = '12'"),
        ({"image.encoder": PartOptions(layers="1:"), "text": LORA}, "the part is frozen"),
        ({"image.connector": PartOptions("full", layers="1:")}, "the part has no list of layers"),
        ({"image.encoder": PartOptions("full", dora=True)}, "dora, and the part is full"),
        ({"image.encoder": LORA, "text": PartOptions("lora", dora=True)}, "dora differs"),
        ({"audio.encoder": FULL}, "some of image.encoder, image.connector, text"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(OptionError, match=message):
        apply_modes(tiny_stock_model("qwen2_5_vl"), options)


def test_a_bare_matrix_carries_no_adapter():
    with pytest.raises(OptionError, match="image.connector = lora, and it has no torch.nn.Linear"):
        apply_modes(tiny_stock_model("gemma3"), {"image.connector": LORA})


def test_a_model_of_another_type_is_refused():
    with pytest.raises(OptionError, match="a model of type 'llama', whose parts are not known"):
        parts_of(tiny_llm(vocab_size=8))


def _options(model, run) -> dict[str, PartOptions]:
    family = model.config.model_type
    options = run("audio" if family == "qwen2_audio" else "image")
    if family in WITHOUT_LINEAR and options.get("image.connector") == LORA:
        del options["image.connector"]
    return options


def _expected(model, options: dict[str, PartOptions]) -> set[str]:
    """Names of the parameters that a step has to change, from the layout of the model and by other means than ours."""
    parts = parts_of(model)
    beside_adapter = any(chosen.mode == "lora" for chosen in options.values())
    expected = set()
    for name, _ in model.named_parameters():
        part = parts[part_of(name, parts.values())]
        chosen = options.get(part.name, FROZEN)
        is_linear = isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear)
        if chosen.mode == "frozen" or name.startswith(part.unused or ("\0",)):
            continue
        if chosen.layers and not _is_in_layers(name, model, chosen.layers):
            continue
        if chosen.mode == "lora" and not (is_linear and name.endswith(".weight") and name != "lm_head.weight"):
            continue
        if beside_adapter and name == "model.image_newline":
            continue
        expected.add(name)
    return expected


def _is_in_layers(name: str, model, layers: str) -> bool:
    numbers = [int(piece) for piece in name.split(".") if piece.isdigit()]
    is_text = "language_model" in name or "text_model" in name
    last = model.config.get_text_config().num_hidden_layers - 1
    wanted = {"1:2": 1, "last:1": last, "-1:": last, ":1": 0}[layers]
    return bool(numbers) and ("layer" in name or "blocks" in name) and numbers[0] == wanted and (
        is_text or layers in ("1:2", ":1")
    )  # fmt: skip


def _step(model, options, batch) -> None:
    groups = learning_rate_groups(model, options, learning_rate=1e-2, weight_decay=0.0)
    optimizer = torch.optim.Adam(groups)
    model.train()
    for _ in range(2):  # an adapter's first step moves one of its matrices only, the other starts at zero
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _below(model, names: list[str]) -> set[str]:
    return {f"{name}.{inner}" for name in names for inner, _ in model.get_submodule(name).named_parameters()}


def _has_graph(output) -> bool:
    tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor.grad_fn is not None
