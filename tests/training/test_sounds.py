"""Rows with sounds through `train/sft.py`, and sounds that are not as they should be."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from mllm import load_model, load_processor
from mllm.assemble import assemble_checkpoint
from mllm.data.collate import PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.errors import MediaError
from mllm.load import merged
from mllm.testing import save_tiny_parts
from mllm.testing_sounds import AUDIO_FAMILIES, RATE, save_tiny_sounds, sine, write_wav

CONNECTOR = {"audio.connector": "full"}
ALL = {"audio.encoder": "full", "audio.connector": "full", "text": {"mode": "lora", "rank": 4}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """It hears windows of a second, in which the longest of the sounds below has two."""
    root = tmp_path_factory.mktemp("hearing")
    return assemble_checkpoint(root / "model", **save_tiny_parts(root, audio={}))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    return save_tiny_sounds(tmp_path_factory.mktemp("sounds"), 12)


@pytest.mark.parametrize("parts", [CONNECTOR, ALL], ids=["connector", "all"])
def test_packed_and_padded_runs_learn_the_same(train, model, sounds, tmp_path, parts):
    options = {"model": str(model), "data": [str(sounds)], "parts": parts, "optim": "sgd", "max_steps": 2}
    padded = train(tmp_path / "padded", **options, per_device_train_batch_size=12)
    packed = train(
        tmp_path / "packed", **options, per_device_train_batch_size=None, batching="packed", pack_length=200,
        gradient_accumulation_steps=100,
    )  # fmt: skip
    before = load_model(model).state_dict()
    one, other = (merged(load_model(run / "final")).state_dict() for run in (padded, packed))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5, msg=name)
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, before[name])}
    trained = (
        {"model.audio_tower.connector."} if parts == CONNECTOR else {"model.audio_tower.", "model.language_model."}
    )
    assert changed and all(name.startswith(tuple(trained)) for name in changed)
    assert not any("embed_positions" in name for name in changed)  # a fixed table
    assert any("audio_tower.encoder" in name for name in changed) == (parts == ALL)


@pytest.mark.parametrize(
    "family", ["whisper", *(pytest.param(name, marks=pytest.mark.slow) for name in AUDIO_FAMILIES[1:])]
)
@pytest.mark.parametrize("mode", ["full", {"mode": "lora", "rank": 4}], ids=["full", "lora"])
def test_every_encoder_can_be_tuned(train, sounds, tmp_path, family, mode):
    """Also where activations are recomputed: the same weights come out."""
    parts = save_tiny_parts(tmp_path, audio={"encoder": family, "window_seconds": 0.8})
    options = {"model": str(assemble_checkpoint(tmp_path / "model", **parts)), "data": [str(sounds)]}
    options |= {"parts": {"audio.encoder": mode, "audio.connector": "full"}, "optim": "sgd", "max_steps": 2}
    plain = train(tmp_path / "plain", **options)
    again = train(tmp_path / "again", **options, gradient_checkpointing=True)
    before = load_model(tmp_path / "model").state_dict()
    one, other = (merged(load_model(run / "final")).state_dict() for run in (plain, again))
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, before[name])}
    assert any("audio_tower.encoder" in name for name in changed)
    assert all("audio_tower" in name for name in changed)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5, msg=name)


def _rows(directory: Path, files: dict[str, np.ndarray | None], **media) -> Path:
    """A row for each file name, and its samples at 16 kHz unless the file is there already."""
    lines = []
    for name, samples in files.items():
        if samples is not None:
            write_wav(directory / name, samples)
        messages = [
            {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "a red 3"},
        ]
        item = {"kind": "audio", "path": name, **media}
        lines.append(json.dumps({"id": name, "source": "odd", "messages": messages, "media": [item]}))
    path = directory / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _batch(model: Path, rows: Path) -> tuple[dict, list[int]]:
    processor = load_processor(model)
    examples = Examples(open_mixture(read_mixture([str(rows)])), processor)
    kept = [examples[number] for number in range(len(examples))]
    counts = [int((one.input_ids == load_model(model).config.audio_token_id).sum()) for one in kept]
    return PaddingCollator(processor)(kept), counts


def test_every_rate_and_any_channels_are_heard_alike(model, tmp_path):
    """The same second of the same tone: as many tokens, and nearly the same spectrogram."""
    directory = tmp_path / "rows"
    directory.mkdir()
    soundfile.write(directory / "8k.wav", sine(1.0, rate=8_000), 8_000)
    soundfile.write(directory / "44k.flac", sine(1.0, rate=44_100), 44_100)
    soundfile.write(directory / "48k.ogg", sine(1.0, rate=48_000), 48_000)
    soundfile.write(directory / "stereo.wav", np.stack([sine(1.0), sine(1.0)], 1), RATE)
    soundfile.write(directory / "six.wav", np.stack([sine(1.0)] * 6, 1), RATE)
    names = ("8k.wav", "44k.flac", "48k.ogg", "stereo.wav", "six.wav")
    batch, counts = _batch(model, _rows(directory, {"plain.wav": sine(1.0), **dict.fromkeys(names)}))
    assert counts == [50] * 6
    assert batch["audio_sizes"].tolist() == [RATE] * 6
    loud = batch["input_features"][0] > 0.5  # where the tone is
    assert loud.any()
    for one in batch["input_features"][1:]:
        torch.testing.assert_close(one[loud], batch["input_features"][0][loud], rtol=0, atol=0.05)


def test_a_long_sound_is_heard_to_its_end(model, tmp_path):
    """Ten seconds with a tone in the last: ten windows, of which only the last is loud, and nothing is left out."""
    samples = np.concatenate([np.zeros(9 * RATE, np.float32), sine(1.0)])
    batch, counts = _batch(model, _rows(tmp_path, {"long.wav": samples}))
    assert (counts, len(batch["input_features"])) == ([500], 10)
    assert [bool((view > 0).any()) for view in batch["input_features"]] == [False] * 9 + [True]


def test_a_cut_is_counted_as_that_part(model, tmp_path):
    batch, counts = _batch(model, _rows(tmp_path, {"x.wav": sine(3.0)}, start=0.5, end=0.9))
    assert (counts, batch["audio_sizes"].tolist()) == ([20], [6400])


def test_bad_sounds_are_left_out_by_name_and_the_rest_is_trained_on(train, model, tmp_path):
    directory = tmp_path / "rows"
    directory.mkdir()
    (directory / "empty.wav").write_bytes(b"")
    (directory / "words.wav").write_bytes(b"just some words\n" * 10)
    whole = write_wav(directory / "whole.wav", sine(2.0)).read_bytes()
    (directory / "torn.wav").write_bytes(whole[: len(whole) // 2])
    files = dict.fromkeys(("empty.wav", "words.wav", "torn.wav"))
    good = {"good.wav": sine(0.7), "silent.wav": np.zeros(RATE, np.float32), "click.wav": sine(0.001)}
    rows = _rows(directory, {**files, "no_samples.wav": np.zeros(0, np.float32), **good})
    out = train(
        tmp_path / "run", model=str(model), parts=CONNECTOR, max_steps=3,
        data=[{"path": str(rows), "on_bad": "quarantine", "max_bad_rate": 0.9}],
    )  # fmt: skip
    facts = json.loads((out / "final" / "run.json").read_text())
    assert (facts["data"][0]["bad"], facts["data"][0]["rows"]) == (3, 4)
    assert (facts["rows"]["used"], facts["rows"]["dropped"]) == (3, {"bad row or media": 1})
    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    reasons = {one["id"]: one["reason"] for one in listed}
    assert sorted(reasons) == ["empty.wav", "no_samples.wav", "torn.wav", "words.wav"]
    assert "a sound of 0.000 seconds" in reasons["no_samples.wav"]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(out / "final" / "model.safetensors").values())


def test_a_row_that_misstates_its_sound_is_bad(model, tmp_path):
    rows = _rows(tmp_path, {"x.wav": sine(1.0)}, seconds=1.0)
    examples = Examples(open_mixture(read_mixture([str(rows)])), load_processor(model))
    write_wav(tmp_path / "x.wav", sine(0.5))  # changed since its header was read
    with pytest.raises(MediaError, match="0.50 s, which the row says is 1.00 s"):
        PaddingCollator(load_processor(model))([examples[0]])
