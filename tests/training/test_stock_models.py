"""Stock checkpoints through `train/sft.py`: trained, gone on with, loaded, merged, and read by transformers alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.models.smolvlm import processing_smolvlm

from mllm.errors import CheckpointError, OptionError
from mllm.load import load_model, load_processor, merged
from mllm.testing import save_tiny_rows
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_stock import STOCK_FAMILIES

FAST = ("llava", "gemma3")
WITHOUT_VIDEO = ("llava", "llava_next", "idefics3", "gemma3", "qwen2_audio")
RESUMED = [pytest.param(name, marks=[] if name == "llava" else [pytest.mark.slow]) for name in STOCK_FAMILIES]
SLOW = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in STOCK_FAMILIES]


@pytest.fixture(autouse=True)
def _num2words(monkeypatch):
    """SmolVLM's processor asks for this package, which it needs for videos only."""
    monkeypatch.setattr(processing_smolvlm, "num2words", processing_smolvlm.num2words or str)


@pytest.fixture(scope="module")
def image_rows(tmp_path_factory) -> Path:
    """Rows with 0, 1 and 2 images."""
    return save_tiny_rows(tmp_path_factory.mktemp("images"), 9, num_images=lambda number: number % 3)


@pytest.fixture(scope="module")
def sound_rows(tmp_path_factory) -> Path:
    """Rows with 0, 1 and 2 sounds, of which one is at another rate."""
    root = tmp_path_factory.mktemp("sounds")
    rows = []
    for number in range(9):
        media = []
        for item in range(number % 3):
            rate = (16_000, 22_050)[item]
            samples = np.random.default_rng(number).normal(size=round(rate * (0.1 + 0.05 * number)), scale=0.1)
            soundfile.write(root / f"{number}-{item}.wav", samples, rate)
            media.append({"kind": "audio", "path": f"{number}-{item}.wav"})
        content = [*({"type": "audio"} for _ in media), {"type": "text", "text": f"What is number {number}?"}]
        answer = {"role": "assistant", "content": "a red 3" + " and a 7" * (number % 5)}
        messages = [{"role": "user", "content": content}, answer]
        rows.append({"id": f"sound-{number}", "source": "tiny", "messages": messages, "media": media})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "rows.jsonl"


@pytest.fixture
def start(train, tmp_path, image_rows, sound_rows):
    """Train a family's checkpoint: LoRA on the language model, the connector in full."""

    def start(family: str, name: str = "run", **options) -> Path:
        checkpoint = tmp_path / family
        if not checkpoint.is_dir():
            save_stock_checkpoint(checkpoint, family)
        kind, rows = ("audio", sound_rows) if family == "qwen2_audio" else ("image", image_rows)
        settled = {
            "model": str(checkpoint),
            "data": [str(rows)],
            "parts": {f"{kind}.connector": "full", "text": {"mode": "lora", "rank": 4}},
            "max_steps": 2,
            "per_device_train_batch_size": 3,
            "save_strategy": "steps",
            "save_steps": 1,
        }
        return train(tmp_path / name, **(settled | options))

    return start


@pytest.mark.parametrize("family", SLOW)
def test_trained_merged_and_read_by_transformers(family, start, tmp_path):
    """A batch has rows with 0, 1 and 2 media. What was trained is in the adapter, and in the stock checkpoint."""
    run = start(family)
    adapter = load_model(run / "final")
    before = load_model(tmp_path / family).state_dict()
    plain = merged(load_model(run / "final")).eval()
    connector = [name for name in before if "projector" in name or "merger" in name or "connector" in name]
    assert connector and any(not torch.equal(plain.state_dict()[name], before[name]) for name in connector)

    plain.save_pretrained(tmp_path / "merged")
    load_processor(run / "final").save_pretrained(tmp_path / "merged")
    stock = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged").eval()
    processor = load_processor(tmp_path / "merged")
    if family in WITHOUT_VIDEO:  # the others need torchvision for it
        assert AutoProcessor.from_pretrained(tmp_path / "merged").chat_template == processor.chat_template

    kind = processor.media_kinds[0]
    data = np.zeros(8000, np.float32) if kind == "audio" else np.full((20, 40, 3), 99, np.uint8)
    question = {"role": "user", "content": [{"type": kind, kind: data}, {"type": "text", "text": "What is it?"}]}
    options = {"sampling_rate": 16_000} if kind == "audio" else {}
    inputs = processor.apply_chat_template(
        [question], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs=options,
    )  # fmt: skip
    torch.testing.assert_close(stock(**inputs).logits, adapter.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)
    made = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (stock, adapter)]
    assert made[0].tolist() == made[1].tolist() and made[0].shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", RESUMED)
def test_resumed_equals_straight(family, start):
    straight = start(family, "straight")
    cut = start(family, "cut")
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "checkpoint-2")
    start(family, "cut")
    one, other = (merged(load_model(run / "final")).state_dict() for run in (straight, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_next_stage_starts_from_the_merged_adapter(start, tmp_path):
    first = start("llava", "first", save_strategy="no")
    second = start("llava", "second", model=str(first / "final"), parts={"image.connector": "full"}, max_steps=1)
    expected = merged(load_model(first / "final")).state_dict()
    final = load_model(second / "final").state_dict()
    assert expected.keys() == final.keys()
    assert all(torch.equal(final[name], expected[name]) for name in final if "projector" not in name)
    assert any(not torch.equal(final[name], expected[name]) for name in final if "projector" in name)


def test_a_template_can_be_chosen(start, tmp_path):
    save_stock_checkpoint(tmp_path / "llava", "llava")
    (tmp_path / "llava" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(OptionError, match="set `chat_template`"):
        start("llava")
    run = start("llava", chat_template="llava", save_strategy="no")
    assert "generation" in load_processor(run / "final").chat_template


def test_models_that_cannot_be_trained_are_named(tmp_path, assembled):
    save_stock_checkpoint(tmp_path, "llava")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="holds a model of type 'llama'\n.*one of llava"):
        load_model(tmp_path)
    with pytest.raises(OptionError, match="which was composed here"):
        load_processor(assembled, chat_template="llava")
