"""Exported == composed: stock classes in a process without mllm answer as the model does, in float32 bit for bit."""

import pytest
import torch

from mllm import load_processor
from mllm.assemble import assemble
from mllm.export import verify
from mllm.export.mappings import LLAVA_ENCODERS, find_target
from mllm.export.native import cast_weights, load_trained, write_stock
from mllm.export.probes import NEW_TOKENS, answer_probes, store_probes, synthetic_probes
from mllm.testing import save_tiny_parts, tiny_model

LANGUAGE_MODELS = ("qwen2", "qwen3", "mistral", "phi3", "smollm3", "olmo2", "gemma3_text")
COMPOSITIONS = {
    **{encoder: {"encoder": encoder} for encoder in LLAVA_ENCODERS},
    **{llm: {"llm": llm} for llm in LANGUAGE_MODELS},
    "tied": {"tied": True},
    "extended embedding": {"spare_rows": 0},
    "extended embedding, tied": {"spare_rows": 0, "tied": True},
    "gemma3_text, tied": {"llm": "gemma3_text", "tied": True},
    "vicuna": {"tokenizer": "llama2", "options": {"chat_template": "vicuna_v1"}},
    "plain": {"tokenizer": "gpt_neox", "options": {"chat_template": "plain"}},
    "squashed": {"image": {"geometry": "squash"}},
    "cropped": {"image": {"geometry": "crop"}},
    "last layer, class token kept": {"image": {"feature_layer": -1, "feature_select": "full"}},
}
SHORT_TYPES = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def answers(tmp_path_factory, train) -> dict[str, tuple]:
    """Ours and stock's answers for every composition; the process that stands for the user is started once."""
    root, expected = tmp_path_factory.mktemp("export"), {}

    def add(name, model, processor):
        probes = synthetic_probes(processor.image_token_rule.image_size)
        expected[name] = answer_probes(model, processor, probes)
        (root / name).mkdir()
        write_stock(model, processor, root / name, target=find_target(model, processor))
        store_probes(root / name, probes, expected[name])

    for name, parts in COMPOSITIONS.items():
        settings = {"options": {}, **parts}
        options = settings.pop("options")
        add(name, *assemble(**save_tiny_parts(tmp_path_factory.mktemp("parts"), **settings), **options))
    for dtype in SHORT_TYPES:
        model, processor = tiny_model(tmp_path_factory.mktemp("parts"))
        cast_weights(model, getattr(torch, dtype))
        add(dtype, model, processor)
    parts = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}
    final = train(tmp_path_factory.mktemp("run") / "adapter", parts=parts) / "final"
    processor = load_processor(final)
    model, origin = load_trained(final, processor, synthetic_probes(16))
    assert origin.merge_max_abs_diff <= 1e-5
    add("adapter", model, processor)
    found = verify.stock_answers([root / name for name in expected])
    return {name: (expected[name], of_stock) for name, of_stock in zip(expected, found, strict=True)}


@pytest.mark.parametrize("name", [*COMPOSITIONS, "adapter"])
def test_exported_equals_composed(answers, name):
    ours, stock = answers[name]
    for one, other in zip(ours, stock, strict=True):
        assert one.input_ids == other.input_ids
        assert one.greedy_ids == other.greedy_ids
        assert one.greedy_text == other.greedy_text
        assert torch.equal(one.logits, other.logits)
        assert (one.pixel_values is None) == (other.pixel_values is None)
        if one.pixel_values is not None:
            assert torch.equal(one.pixel_values, other.pixel_values)


@pytest.mark.parametrize("dtype", SHORT_TYPES)
def test_exported_equals_composed_up_to_a_rounding(answers, dtype):
    parity = verify.compare(*answers[dtype], dtype=dtype)
    assert parity.is_equal
    assert 0 < parity.tolerance < 0.05
    assert answers[dtype][1][0].logits.dtype == getattr(torch, dtype)


def test_answers_tell_models_and_images_apart(answers):
    """Equality would mean nothing if every model said the same, or no model looked at its image."""
    first = [answers[name][0][1].logits for name in (*LLAVA_ENCODERS, "adapter")]
    assert all(not torch.equal(one, other) for at, one in enumerate(first) for other in first[:at])
    longest = max(len(answer.greedy_ids) for ours, _ in answers.values() for answer in ours)
    assert longest == NEW_TOKENS
