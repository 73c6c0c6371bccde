"""An adapter is loaded whole, on the model it was trained on, or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllm import load_model
from mllm.assemble import assemble_checkpoint
from mllm.errors import CheckpointError
from mllm.models.parts import PartOptions, apply_modes
from mllm.testing import save_tiny_parts

OTHERS: dict[str, dict] = {
    "fewer layers": {"num_hidden_layers": 1},
    "another family": {"llm": "gpt_neox"},
}


@pytest.fixture
def adapter(assembled, tmp_path) -> Path:
    model = apply_modes(
        load_model(assembled), {"image.connector": PartOptions("full"), "text": PartOptions("lora", rank=4)}
    )
    model.peft_config["default"].base_model_name_or_path = str(assembled)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("other", ["fewer layers", "another family"])
def test_on_another_model(adapter, tmp_path, other):
    base = assemble_checkpoint(tmp_path / "other", **save_tiny_parts(tmp_path, **OTHERS[other]))
    _point_to(adapter, base)
    with pytest.raises(CheckpointError, match="does not fit the model in"):
        load_model(adapter)


@pytest.mark.parametrize("part", ["image_tower", "language_model"])
def test_a_weight_too_few(adapter, part):
    weights = _weights(adapter)
    del weights[next(name for name in weights if part in name)]
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the model in"):
        load_model(adapter)


def test_a_weight_too_many(adapter):
    weights = _weights(adapter)
    name = next(name for name in weights if ".layers.0." in name)
    save_file(weights | {name.replace(".0.", ".7."): weights[name].clone()}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="1 weights of one are not in the other"):
        load_model(adapter)


def test_pickled_weights_are_not_read(adapter):
    weights = _weights(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="has no adapter_model.safetensors"):
        load_model(adapter)


def test_on_a_model_of_another_configuration_that_would_fit(train, tmp_path):
    """Layers more than the adapter knows of: every weight finds its place."""
    final = train(tmp_path / "run", parts={"text": {"mode": "lora", "rank": 4}}) / "final"
    base = assemble_checkpoint(tmp_path / "other", **save_tiny_parts(tmp_path, num_hidden_layers=3))
    assert torch.isfinite(load_model(final)(input_ids=torch.arange(6)[None]).logits).all()
    _point_to(final, base)
    with pytest.raises(CheckpointError, match=r"its config.json is not the one that was trained on"):
        load_model(final)


def _point_to(adapter: Path, base: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))


def _weights(adapter: Path) -> dict[str, torch.Tensor]:
    """Copies: the file is written anew."""
    return {name: weight.clone() for name, weight in load_file(adapter / "adapter_model.safetensors").items()}
