"""Adapter == reloaded adapter == merged == merged and reloaded; a full model saved == reloaded."""

import shutil

import pytest
import torch

from mllm import load_model, load_processor
from mllm.data.indexing.index import open_index
from mllm.data.sources import Source
from mllm.load import merged
from mllm.processing.images import decode_image
from mllm.testing import save_tiny_parts, save_tiny_rows

PARTS = {
    "text lora": {"text": {"mode": "lora", "rank": 4}},
    "text lora, connector full": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}},
    "both lora, ranks differ": {"image.encoder": {"mode": "lora", "rank": 2, "alpha": 3}, "text": {"mode": "lora"}},
    "encoder full beside lora": {"image.encoder": "full", "text": {"mode": "lora", "rank": 4}},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_adapter_equals_merged(train, tmp_path, parts):
    final = train(tmp_path / "run", parts=parts) / "final"
    inputs = _inputs(final, tmp_path)
    adapter = load_model(final)
    with_adapter = adapter.eval()(**inputs).logits
    assert torch.equal(load_model(final).eval()(**inputs).logits, with_adapter)
    tokens = _greedy(adapter, inputs)
    plain = merged(adapter).eval()
    torch.testing.assert_close(plain(**inputs).logits, with_adapter, rtol=0, atol=1e-5)
    assert torch.equal(_greedy(plain, inputs), tokens)
    plain.save_pretrained(tmp_path / "merged")
    reloaded = load_model(tmp_path / "merged").eval()
    assert torch.equal(reloaded(**inputs).logits, plain(**inputs).logits)


def test_a_moved_run_still_finds_its_base(train, tmp_path):
    parts = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}
    run = train(tmp_path / "run", model=save_tiny_parts(tmp_path / "tiny"), parts=parts)
    inputs = _inputs(run / "final", tmp_path)
    before = load_model(run / "final").eval()(**inputs).logits
    shutil.move(run, tmp_path / "elsewhere" / "moved")
    assert torch.equal(load_model(tmp_path / "elsewhere" / "moved" / "final").eval()(**inputs).logits, before)


def _inputs(checkpoint, directory) -> dict[str, torch.Tensor]:
    """A prompt about one image."""
    row = open_index(Source(save_tiny_rows(directory / "prompt", 2)))[1]
    processor = load_processor(checkpoint)
    chat = processor.encode_chat(
        row.messages[:1], media_sizes=[(row.media[0].height, row.media[0].width)], add_generation_prompt=True
    )
    pixels = processor.encode_images([decode_image(row.media[0].path)])
    return {"input_ids": torch.tensor([chat.input_ids]), "pixel_values": pixels}


def _greedy(model, inputs) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=8, do_sample=False)
