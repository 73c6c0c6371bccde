"""Packed == unpacked: the rows of a pack give the loss and every gradient that they give side by side in a batch.

The reference is a padded batch, and the pack itself under a dense mask of blocks. That the comparison would see a row
that looks at its neighbour is tested, too.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.smolvlm import processing_smolvlm

from mllm import load_model, load_processor
from mllm.data.collate import PackingCollator, PaddingCollator
from mllm.data.examples import Example, Examples
from mllm.data.labels import IGNORED
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.errors import OptionError
from mllm.load import merged
from mllm.models import segment_attention as segments
from mllm.models.parts import apply_modes, parts_of
from mllm.models.segment_attention import isolate_segments
from mllm.models.supervised import attach_supervised_forward
from mllm.testing import save_tiny_rows, tiny_model
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.training.argument_checks import read_parts

NUM_ROWS = 7
LORA = {"mode": "lora", "rank": 4}
COMPOSED = ("llama", "qwen3", "gpt_neox", "granite")
STOCK = ("llava", "llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3", "qwen2_audio")
FAST = ("llama", "llava", "idefics3")
SLOW = tuple(family for family in COMPOSED + STOCK if family not in FAST)
STOCK_UNPACKABLE = ("qwen2_5_vl", "qwen3_vl", "gemma3")


@pytest.fixture(autouse=True)
def _num2words(monkeypatch):
    """SmolVLM's processor writes out the numbers of videos with it; we have none."""
    monkeypatch.setattr(processing_smolvlm, "num2words", processing_smolvlm.num2words or str)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def data(place) -> Callable[[str], Path]:
    """Rows with none, one and two media of the kind that a family reads."""

    @lru_cache
    def save(kind: str) -> Path:
        if kind == "image":
            return save_tiny_rows(place / "images", NUM_ROWS, num_images=lambda number: number % 3)
        return _save_sounds(place / "sounds")

    return lambda family: save("audio" if family == "qwen2_audio" else "image")


@pytest.fixture(scope="module")
def models(place) -> Callable[[str], Path]:
    """The checkpoint of a composed model with this language model, or of a stock family."""

    @lru_cache
    def save(family: str) -> Path:
        path = place / family
        if family in (*STOCK, *STOCK_UNPACKABLE):
            return save_stock_checkpoint(path, family)
        model, processor = tiny_model(place / f"parts of {family}", llm=family)
        model.save_pretrained(path)
        processor.save_pretrained(path)
        return path

    return save


@pytest.mark.parametrize("family", [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_packed_equals_padded_and_dense(models, data, family, mode):
    path = models(family)
    examples = _examples(path, data(family))
    batches = {"packed": PackingCollator(load_processor(path))(examples)}
    batches["padded"] = PaddingCollator(load_processor(path))(examples)
    batches["dense"] = _under_a_dense_mask(batches["packed"])
    found = {}
    for name, batch in batches.items():
        model = _trainable(path, mode, is_isolated=name != "dense")
        found[name] = _loss_and_gradients(model, batch)
    assert found["packed"][0].isfinite() and len(found["packed"][1]) > 10
    _assert_equal(found["packed"], found["padded"])
    _assert_equal(found["packed"], found["dense"])


def test_a_pack_of_one_row_is_that_row(models, data):
    path = models("llama")
    examples = _examples(path, data("llama"))[2:3]
    model = _trainable(path, "full", is_isolated=True)
    packed = _loss_and_gradients(model, PackingCollator(load_processor(path))(examples))
    _assert_equal(packed, _loss_and_gradients(model, PaddingCollator(load_processor(path))(examples)))


def test_recomputed_activations_change_nothing(models, data):
    path = models("llama")
    batch = PackingCollator(load_processor(path))(_examples(path, data("llama")))
    plain = _loss_and_gradients(_trainable(path, "full", is_isolated=True), batch)
    model = _trainable(path, "full", is_isolated=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _assert_equal(plain, _loss_and_gradients(model.train(), batch))


@pytest.mark.parametrize("leak", ["one row for all", "the first two joined", "positions that go on"])
def test_a_leak_would_be_seen(models, data, leak):
    """Without isolation, or without positions that start again, the comparison above fails."""
    path = models("llama")
    batch = PackingCollator(load_processor(path))(_examples(path, data("llama")))
    right = _loss_and_gradients(_trainable(path, "full", is_isolated=True), batch)
    lengths, num_tokens = batch.pop("segment_lengths"), batch["input_ids"].shape[1]
    if leak == "one row for all":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    elif leak == "the first two joined":
        batch["segment_lengths"] = (lengths[0] + lengths[1], *lengths[2:])
    else:
        batch |= _under_a_dense_mask(batch | {"segment_lengths": lengths})
        batch["position_ids"] = torch.arange(num_tokens)[None].roll(3, dims=1)
    leaking = _loss_and_gradients(_trainable(path, "full", is_isolated=True), batch)
    with pytest.raises(AssertionError):
        _assert_equal(right, leaking)


def test_padding_is_still_masked_under_the_attention_of_packs(models, data):
    """Also where a row begins with padding, as in generation; by transformers' own SDPA it is, too."""
    path = models("llama")
    batch = PaddingCollator(load_processor(path))(_examples(path, data("llama"))[:3])
    del batch["labels"]
    left = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    for inputs in (batch, batch | left):
        isolated, plain = (
            _trainable(path, "full", is_isolated=is_isolated)(**inputs).logits for is_isolated in (True, False)
        )
        visible = inputs["attention_mask"].bool()
        torch.testing.assert_close(isolated[visible], plain[visible], rtol=0, atol=0)


def test_an_encoder_keeps_its_own_attention(models):
    model = _trainable(models("llama"), "full", is_isolated=True)
    assert model.config.text_config._attn_implementation == segments.SEGMENTS
    assert model.config.image_config.encoder_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("parts", [{"text": "full"}, {"text": LORA}], ids=["full", "lora"])
def test_packs_accumulated_equal_one_large_batch(train, tmp_path, parts):
    """All twelve rows in every step: as packs of 90 tokens one after the other, and as one padded batch."""
    options = {"parts": {"image.connector": "full", **parts}, "optim": "sgd", "max_steps": 2}
    whole = train(tmp_path / "whole", **options, per_device_train_batch_size=12)
    packed = train(
        tmp_path / "packed", **options, per_device_train_batch_size=None, batching="packed", pack_length=90,
        gradient_accumulation_steps=100,
    )  # fmt: skip
    one, other = (merged(load_model(run / "final")).state_dict() for run in (whole, packed))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", STOCK_UNPACKABLE)
def test_what_cannot_be_isolated_is_refused_with_a_way_out(models, family):
    model = load_model(models(family))
    with pytest.raises(OptionError, match=r"batching = 'packed'.*\n.*\n.*batching: length"):
        isolate_segments(model, longest=50)


def _save_sounds(root: Path) -> Path:
    soundfile = pytest.importorskip("soundfile")
    root.mkdir()
    rows = []
    for number in range(NUM_ROWS):
        names = [f"{number}-{item}.wav" for item in range(number % 3)]
        for name in names:
            soundfile.write(root / name, np.random.default_rng(number).normal(size=1600 + 800 * number) / 10, 16_000)
        content = [*({"type": "audio"} for _ in names), {"type": "text", "text": f"What is number {number}?"}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "a red 3" * (1 + number % 4)},
        ]
        media = [{"kind": "audio", "path": name} for name in names]
        rows.append(json.dumps({"id": str(number), "source": "tiny", "messages": messages, "media": media}))
    (root / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root / "rows.jsonl"


def _examples(path: Path, rows: Path) -> list[Example]:
    """Encoded rows, some of whose labels weigh less."""
    examples = Examples(open_mixture(read_mixture([str(rows)])), load_processor(path))
    encoded = [examples[number] for number in range(len(examples))]
    for number in (1, 4):
        weights = np.where(encoded[number].labels == IGNORED, 0.0, 0.25).astype(np.float32)
        encoded[number] = replace(encoded[number], loss_weights=weights)
    return encoded


def _trainable(path: Path, mode: str, *, is_isolated: bool) -> nn.Module:
    """The model with everything trained, its adapters (which begin at zero) moved a little."""
    model = load_model(path, dtype="float32")
    if is_isolated:
        isolate_segments(model, longest=200)
    whole = {"full": "full", "lora": LORA}[mode]
    torch.manual_seed(1)
    model = apply_modes(model, read_parts({name: whole if name == "text" else "full" for name in parts_of(model)}))
    attach_supervised_forward(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _loss_and_gradients(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


def _assert_equal(one, other) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-5, atol=1e-5, msg=name)


def _under_a_dense_mask(batch: dict) -> dict:
    """A packed batch for plain SDPA: each token sees the tokens before it in its segment, and nothing else."""
    lengths = batch["segment_lengths"]
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    causal = torch.ones(len(number), len(number), dtype=torch.bool).tril()
    mask = (number[:, None] == number[None]) & causal
    return {key: value for key, value in batch.items() if key != "segment_lengths"} | {
        "attention_mask": mask[None, None]
    }
