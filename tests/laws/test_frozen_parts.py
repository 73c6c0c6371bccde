"""Frozen parts stay equal, trained parts change: every tensor of them, and nothing else."""

import pytest
import torch
from safetensors.torch import load_file

from mllm import load_model
from mllm.load import merged
from mllm.models.parts import linear_modules, part_of, parts_of

RUNS = {
    "connector full": {"image.connector": "full"},
    "all full": {"image.encoder": "full", "image.connector": "full", "text": "full"},
    "text lora": {"text": {"mode": "lora", "rank": 4}},
    "text lora, connector full": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}},
    "encoder lora": {"image.encoder": {"mode": "lora", "rank": 4}},
    "encoder full beside lora": {"image.encoder": "full", "text": {"mode": "lora", "rank": 4}},
}


@pytest.mark.parametrize("parts", RUNS.values(), ids=RUNS.keys())
def test_trained_changed_and_frozen_did_not(train, tmp_path, assembled, parts):
    model = load_model(assembled)
    final = merged(load_model(train(tmp_path / "run", parts=parts) / "final"))
    before, after = model.state_dict(), final.state_dict()
    expected = {name for name in before if _is_trained(name, model, parts)}
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected


def test_a_frozen_language_model_answers_text_as_before(train, tmp_path, assembled):
    parts = {"image.encoder": "full", "image.connector": "full"}
    before = load_model(assembled)
    after = load_model(train(tmp_path / "run", parts=parts) / "final")
    input_ids = torch.randint(0, 400, (2, 12))
    assert torch.equal(before(input_ids=input_ids).logits, after(input_ids=input_ids).logits)


def test_an_adapter_checkpoint_holds_what_was_trained_and_nothing_else(train, tmp_path):
    parts = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}
    saved = load_file(train(tmp_path / "run", parts=parts) / "final" / "adapter_model.safetensors")
    prefix = "base_model.model.model."
    assert {name.removeprefix(prefix).split(".")[0] for name in saved} == {"image_tower", "language_model"}
    assert all(".lora_" in name or ".connector." in name for name in saved)


def _is_trained(name: str, model, parts: dict) -> bool:
    all_parts = parts_of(model)
    part = all_parts[part_of(name, all_parts.values())]
    chosen = parts.get(part.name, "frozen")
    mode = chosen if isinstance(chosen, str) else chosen["mode"]
    if mode == "lora":
        return name.removesuffix(".weight") in linear_modules(model, part)
    return mode == "full" and not name.startswith(part.unused or ("\0",))
