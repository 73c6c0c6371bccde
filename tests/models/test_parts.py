import warnings

import pytest
import torch

from mllm.errors import OptionError
from mllm.models.parts import (
    PartOptions,
    adapted_modules,
    apply_modes,
    freeze_unused,
    learning_rate_groups,
    linear_modules,
    parts_of,
    summarize_parts,
)
from mllm.testing import tiny_model

FULL, FROZEN = PartOptions("full"), PartOptions()
LORA = PartOptions("lora", rank=4)


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path)[0]


def test_parts_of_a_composed_model_cover_every_parameter(model):
    parts = parts_of(model)
    assert list(parts) == ["image.encoder", "image.connector", "text"]
    groups = learning_rate_groups(model, {}, learning_rate=1.0, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_adapters_stand_on_the_language_model_alone_although_names_collide(model):
    """CLIP has q_proj, k_proj and v_proj, too."""
    targets = linear_modules(model, parts_of(model)["text"])
    assert len(targets) == 2 * 7
    adapted = apply_modes(model, {"text": LORA})
    assert adapted_modules(adapted) == sorted(targets)
    assert "lm_head" not in targets
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(targets) and all(".language_model." in name for name in trained)


@pytest.mark.parametrize("options", [{"text": LORA}, {"image.encoder": LORA}, {"image.encoder": LORA, "text": LORA}])
def test_many_targets_stay_exact_names(tmp_path, options):
    """From 20 names on PEFT looks for common endings of them."""
    model = tiny_model(tmp_path, num_hidden_layers=6)[0]
    parts = parts_of(model)
    targets = sorted(target for name in options for target in linear_modules(model, parts[name]))
    adapted = apply_modes(model, options)
    assert adapted_modules(adapted) == targets
    assert sorted(adapted.peft_config["default"].target_modules) == targets


def test_an_encoders_unused_layers_carry_no_adapter(tmp_path):
    model = tiny_model(tmp_path, encoder="vit")[0]
    assert any(isinstance(module, torch.nn.Linear) for module in model.model.image_tower.encoder.pooler.modules())
    assert not any(".pooler." in name for name in linear_modules(model, parts_of(model)["image.encoder"]))


def test_each_part_has_its_own_rank_and_alpha(model):
    options = {"image.encoder": PartOptions("lora", rank=2, alpha=6.0), "text": PartOptions("lora", rank=4, alpha=4.0)}
    adapted = apply_modes(model, options)
    for name, module in adapted.named_modules():
        if name.endswith("lora_A.default"):
            assert module.out_features == (2 if ".image_tower." in name else 4)
    scalings = {
        name.split(".")[3]: module.scaling["default"]
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    assert scalings == {"image_tower": 3.0, "language_model": 1.0}


def test_full_parts_beside_an_adapter_are_copies_that_are_saved(model):
    adapted = apply_modes(model, {"image.encoder": FULL, "image.connector": FULL, "text": LORA})
    plain = dict(adapted.get_base_model().named_parameters())
    connector = "model.image_tower.connector"
    assert plain[f"{connector}.modules_to_save.default.linear_1.weight"].requires_grad
    assert not plain[f"{connector}.original_module.linear_1.weight"].requires_grad
    assert not plain["model.image_tower.encoder.modules_to_save.default.post_layernorm.weight"].requires_grad
    tower = adapted.get_base_model().model.image_tower
    assert not tower.is_encoder_frozen and tower.encoder.dtype == torch.float32
    assert tower.train().encoder.training


def test_what_peft_opens_again_is_frozen_again(model):
    adapted = apply_modes(model, {"image.encoder": FULL, "text": LORA})
    adapted.set_adapter("default")
    unused = [p for name, p in adapted.named_parameters() if ".post_layernorm." in name]
    assert any(parameter.requires_grad for parameter in unused)
    freeze_unused(adapted)
    assert not any(parameter.requires_grad for parameter in unused)


def test_a_frozen_encoder_beside_an_adapter_stays_in_eval_mode(model):
    adapted = apply_modes(model, {"text": LORA}).train()
    assert not adapted.get_base_model().model.image_tower.encoder.training


def test_learning_rates_and_decay_by_part(model):
    options = {"image.connector": PartOptions("full", learning_rate=0.0), "text": FULL}
    apply_modes(model, options)
    groups = learning_rate_groups(model, options, learning_rate=3e-4, weight_decay=0.1)
    found = {group["name"]: (group["lr"], group["weight_decay"], len(group["params"])) for group in groups}
    assert found["image.connector/decayed"] == (0.0, 0.1, 2)
    assert found["image.connector/not decayed"] == (0.0, 0.0, 2)
    assert found["text/decayed"][:2] == (3e-4, 0.1) and found["text/not decayed"][:2] == (3e-4, 0.0)
    assert len(found) == 4
    summary = {part.name: part for part in summarize_parts(model, options, learning_rate=3e-4)}
    assert summary["image.connector"].learning_rate == 0.0
    assert summary["image.encoder"].trainable == 0 and summary["image.encoder"].learning_rate is None


def test_a_parameter_whose_share_on_this_rank_is_empty_is_counted_and_decayed(model):
    """As ZeRO-3 leaves it: no elements, and its shape beside it."""
    options = {"image.connector": FULL}
    plain = [row.parameters for row in summarize_parts(model, options, learning_rate=1.0)]
    apply_modes(model, options)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert [row.parameters for row in summarize_parts(model, options, learning_rate=1.0)] == plain
    groups = learning_rate_groups(model, options, learning_rate=1.0, weight_decay=0.1)
    assert {group["name"] for group in groups} == {"image.connector/decayed", "image.connector/not decayed"}


def test_the_summary_counts_copies_and_adapters_apart(model):
    options = {"image.connector": FULL, "text": LORA}
    before = {part.name: part.parameters for part in summarize_parts(model, {}, learning_rate=1.0)}
    summary = {part.name: part for part in summarize_parts(apply_modes(model, options), options, learning_rate=1.0)}
    assert {name: part.parameters for name, part in summary.items()} == before
    assert summary["image.connector"].trainable == before["image.connector"]
    assert summary["text"].adapted == 14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": FULL}, "parts: 'vision'"),
        ({"text": PartOptions("half")}, "mode = 'half'"),
        ({"text": FROZEN}, "every part is frozen"),
        ({}, "every part is frozen"),
        ({"image.encoder": LORA, "text": FULL}, "text = full beside a lora part"),
        ({"image.encoder": LORA, "text": PartOptions("lora", dropout=0.1)}, "dropout differs"),
    ],
)
def test_wrong_options(model, options, message):
    with pytest.raises(OptionError, match=message):
        apply_modes(model, options)


def test_a_part_without_linear_layers_cannot_be_adapted(model, monkeypatch):
    """As GPT-2, whose layers are of a kind of its own."""
    monkeypatch.setattr(torch.nn, "Linear", type(None))
    with pytest.raises(OptionError, match="no torch.nn.Linear"):
        apply_modes(model, {"text": LORA})


def test_float16_weights_are_not_trained(model):
    with pytest.raises(OptionError, match="its weights are float16"):
        apply_modes(model.half(), {"image.connector": FULL})


def test_adapting_is_silent(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_modes(model, {"image.connector": FULL, "text": LORA})
