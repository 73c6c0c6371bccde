"""Law: generation with a cache gives what it gives without: greedy tokens equal, scores to 1e-5 in float32."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.inference.generation import generation_config
from mllm.inference.prompt import encode_prompt, model_inputs
from mllm.testing import tiny_model

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox"]


def _question(seed: int, num_images: int) -> list[dict]:
    random = np.random.default_rng(seed)
    pictures = [
        Image.fromarray(random.integers(0, 255, (12 + seed, 20, 3), dtype=np.uint8)) for _ in range(num_images)
    ]
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "Is there a 5? " * (1 + seed)}]}]


PROMPTS = {
    "text only": [_question(0, 0)],
    "one image": [_question(0, 1)],
    "three images": [_question(1, 3)],
    "left-padded": [_question(0, 1), _question(3, 2), _question(1, 0)],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS.keys())
def test_cached_equals_uncached(tmp_path, family, prompts):
    model, processor = tiny_model(tmp_path, llm=family)
    _compare(model, processor, prompts, num_beams=1)


@pytest.mark.parametrize("name", PROMPTS.keys())
def test_cached_equals_uncached_with_beams(tmp_path, name):
    model, processor = tiny_model(tmp_path)
    _compare(model, processor, PROMPTS[name], num_beams=3)


def _compare(model, processor, prompts, *, num_beams: int) -> None:
    inputs = model_inputs(processor, [encode_prompt(processor, prompt) for prompt in prompts], device=model.device)
    config = generation_config(model, max_new_tokens=8, temperature=0.0)
    config.num_beams = num_beams
    config.return_dict_in_generate = config.output_scores = True
    with _recorded_lengths(model) as cached_lengths:
        cached = model.generate(**inputs, generation_config=config, use_cache=True)
    with _recorded_lengths(model) as uncached_lengths:
        uncached = model.generate(**inputs, generation_config=config, use_cache=False)
    assert set(cached_lengths[1:]) == {1} and min(uncached_lengths) > 1
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.scores, uncached.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@contextmanager
def _recorded_lengths(model):
    """How many positions the language model computes in each step."""
    lengths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        yield lengths
    finally:
        hook.remove()
