"""Law: on text alone the composed model is the language model, bit for bit in float32."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mllm.testing import tiny_model

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "olmo2", "gemma3_text", "gpt2", "gpt_neox"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_composed_equals_bare(tmp_path, family, tied):
    model, processor = tiny_model(tmp_path, llm=family, tied=tied)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    messages = [{"role": "user", "content": [{"type": "text", "text": "Is there a red 5 at the top left?"}]}]
    ids = torch.tensor([processor.encode_chat(messages, media_sizes=[], add_generation_prompt=True).input_ids])
    assert torch.equal(model(input_ids=ids).logits, bare(input_ids=ids).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": model.generation_config.suppress_tokens}
    ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings, **ends), bare.generate(ids, **settings, **ends))
