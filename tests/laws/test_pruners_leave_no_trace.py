"""A pruner leaves nothing behind: on its model, on another, in transformers, or in a batch of text alone.

Bit for bit, on the same objects, also after an exception.
"""

import subprocess
import sys

import pytest
import torch

from mllm.pruning import PRUNERS, Pruner
from mllm.testing_pruning import Shuffles, answered, pictures_and_words, tiny_prunable_model

NAMES = ["shuffles", *sorted(PRUNERS)]


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    return tiny_prunable_model(tmp_path_factory.mktemp("parts"))


def made(name: str) -> Pruner:
    return Shuffles() if name == "shuffles" else PRUNERS[name](tokens=9)


@pytest.mark.parametrize("name", NAMES)
def test_a_pruner_leaves_no_trace(composed, name):
    model = composed[0]
    inputs = pictures_and_words(model)
    expected = answered(model, inputs)  # what transformers installs when first asked is installed
    before = _traces(model)
    pruner = made(name)
    with pruner(model):
        assert not torch.equal(torch.stack(answered(model, inputs).logits), torch.stack(expected.logits))
    assert _traces(model) == before
    with pytest.raises(ZeroDivisionError), pruner(model):
        raise ZeroDivisionError
    assert _traces(model) == before
    pruner.select_at_cut = pruner.select = _fails
    with pytest.raises(ZeroDivisionError), pruner(model):
        answered(model, inputs)
    assert _traces(model) == before
    assert torch.equal(torch.stack(answered(model, inputs).logits), torch.stack(expected.logits))


@pytest.mark.slow
def test_importing_changes_nothing_in_transformers():
    program = """
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
import mllm.models
tables = lambda: [dict(one) for one in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)] + [
    dict(vars(one)) for one in (transformers.Cache, transformers.DynamicCache, transformers.PreTrainedModel)]
before = tables()
import mllm.pruning
assert tables() == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_second_model_is_unaffected(composed, tmp_path):
    other, _ = tiny_prunable_model(tmp_path)
    inputs = pictures_and_words(other)
    expected = torch.stack(answered(other, inputs).logits)
    with Shuffles()(composed[0]):
        answered(composed[0], inputs)
        assert torch.equal(torch.stack(answered(other, inputs).logits), expected)


@pytest.mark.parametrize("name", NAMES)
def test_text_alone_is_untouched(composed, name):
    model = composed[0]
    inputs = {"input_ids": torch.arange(20, 44).view(2, 12), "attention_mask": torch.ones(2, 12).long()}
    inputs["attention_mask"][1, :3] = 0
    for options in ({}, {"cache_implementation": "static"}):
        expected = torch.stack(answered(model, inputs, **options).logits)
        with made(name)(model):
            assert torch.equal(torch.stack(answered(model, inputs, **options).logits), expected)


def _fails(*args):
    raise ZeroDivisionError


def _traces(model) -> dict:
    """All that a plug-in could leave behind: objects, their attributes and hooks, the config, the weights' bytes."""
    found: dict = {"config": str(model.config.to_dict()), "generation": str(model.generation_config.to_dict())}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if not key.endswith("_hooks")}
        for key, value in vars(module).items():
            if isinstance(value, dict):
                attributes[key] = {one: id(other) for one, other in value.items()}
        found[name] = (id(module), type(module), attributes)
    found |= {f"weights of {name}": value.clone().numpy().tobytes() for name, value in model.state_dict().items()}
    return found
