"""Sounds in rows: alone == together == packed, loss and every gradient, for every audio encoder.

The sounds are WAV files of unequal length, some of several windows; the encoder is trained, too.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from mllm.data.collate import PackingCollator, PaddingCollator
from mllm.data.examples import Example, Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.models import MllmForConditionalGeneration
from mllm.models.parts import PartOptions, apply_modes, parts_of
from mllm.models.segment_attention import isolate_segments
from mllm.testing import tiny_model
from mllm.testing_sounds import AUDIO_FAMILIES, save_tiny_sounds

NUM_ROWS = 6
LENGTH = {"max_new_tokens": 6, "min_new_tokens": 6}
FAST = ("whisper", "wav2vec2-layer")
SLOW = tuple(family for family in AUDIO_FAMILIES if family not in FAST)
VIDEO_LLAMA = {
    "type": "qformer", "num_queries": 4, "layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 32,
    "cross_attention_frequency": 1, "dropout": 0.0, "per": "item", "positions": 8,
}  # fmt: skip
AUDIO = {family: {"encoder": family, "window_seconds": 0.8} for family in AUDIO_FAMILIES}
AUDIO |= {
    "pooled": {"connector": {"type": "pool", "size": 4}, "pool_time": True},
    "Video-LLaMA": {
        "encoder": "audio-spectrogram-transformer",
        "window_seconds": 0.2,
        "clips": 8,
        "connector": VIDEO_LLAMA,
    },
    "stacked": {"connector": {"type": "frame_stack", "size": 4}, "counts_silence": True},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return save_tiny_sounds(tmp_path_factory.mktemp("sounds"), NUM_ROWS, num_sounds=lambda number: number % 3)


@pytest.mark.parametrize(
    "name",
    [*(name for name in AUDIO if name not in SLOW), *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_alone_together_and_packed(name, rows, tmp_path):
    model, processor = tiny_model(tmp_path, audio=AUDIO[name])
    model = _trainable(model)
    examples = list(_examples(rows, processor))
    whole = _loss_and_gradients(model, PaddingCollator(processor)(examples))
    alone = [_loss_and_gradients(model, PaddingCollator(processor)([one])) for one in examples]
    learned = torch.tensor([int((one.labels[1:] != -100).sum()) for one in examples])
    shares = learned / learned.sum()
    mean = {
        key: sum(
            share * gradients[key] for share, (_, gradients) in zip(shares, alone, strict=True) if key in gradients
        )
        for key in whole[1]
    }
    torch.testing.assert_close(sum(share * loss for share, (loss, _) in zip(shares, alone, strict=True)), whole[0])
    assert any(key.startswith("model.audio_tower.encoder") for key in whole[1])
    _assert_close(mean, whole[1])
    isolate_segments(model, longest=2000)
    packed = _loss_and_gradients(model, PackingCollator(processor)(examples))
    torch.testing.assert_close(packed[0], whole[0], rtol=1e-5, atol=1e-5)
    _assert_close(packed[1], whole[1])


@pytest.mark.parametrize("name", ["whisper", "Video-LLaMA"])
@pytest.mark.parametrize("beams", [1, 2])
def test_answers_to_sounds_in_one_batch_are_those_to_each_alone(name, beams, rows, tmp_path):
    model, processor = tiny_model(tmp_path, audio=AUDIO[name])
    for matrix in [model.lm_head.weight, *model.model.audio_tower.connector.parameters()]:
        nn.init.normal_(matrix)  # else the same token comes for ever, whatever there is to hear
    examples = [one for one in _examples(rows, processor) if one.row.media]
    prompts = []
    for one in examples:
        ids = one.input_ids[: int((one.labels != -100).argmax())]
        prompts.append((ids, PaddingCollator(processor)([one])))
    alone = []
    for ids, batch in prompts:
        media = {key: value for key, value in batch.items() if key in ("input_features", "audio_sizes")}
        alone.append(_answer(model, [ids], media, beams)[0])
    together = {key: torch.cat([batch[key] for _, batch in prompts]) for key in ("input_features", "audio_sizes")}
    assert _answer(model, [ids for ids, _ in prompts], together, beams) == alone
    assert len({tuple(answer) for answer in alone}) > 1


def _answer(model: MllmForConditionalGeneration, rows: list, media: dict, beams: int) -> list[list[int]]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.as_tensor(row)
        mask[place, width - len(row) :] = 1
    out = model.generate(ids, attention_mask=mask, **media, **LENGTH, do_sample=False, num_beams=beams)
    return out[:, width:].tolist()


def _examples(rows: Path, processor) -> list[Example]:
    examples = Examples(open_mixture(read_mixture([str(rows)])), processor)
    return [examples[number] for number in range(len(examples))]


def _trainable(model: MllmForConditionalGeneration) -> MllmForConditionalGeneration:
    return apply_modes(model, {name: PartOptions("full") for name in parts_of(model)}).eval()


def _loss_and_gradients(model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in found.items()}


def _assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() >= expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
