"""Prompts padded on the left and answered together == each answered alone, whatever tells the positions."""

import pytest
import torch

from mllm.export.probes import probe_inputs, synthetic_probes
from mllm.export.stock_process import continue_greedily
from mllm.testing import tiny_model


@pytest.mark.parametrize("llm", ["llama", "gpt2"])  # rotary, and learned absolute positions
def test_generation_counts_positions_from_the_first_token(tmp_path, llm):
    model, processor = tiny_model(tmp_path, llm=llm)
    prompts = [probe_inputs(processor, probe) for probe in synthetic_probes(16)]
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    together = continue_greedily(model, prompts, 8)
    widths = torch.tensor([prompt["input_ids"].shape[1] for prompt in prompts])
    assert torch.equal(seen[0].max(dim=1).values, widths - 1)
    for prompt, (ids, _) in zip(prompts, together, strict=True):
        alone = continue_greedily(model, [prompt], 8)[0][0]
        assert ids.tolist() == alone.tolist()
