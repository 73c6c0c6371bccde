"""Mixed weights are the weighted sum, tensor by tensor, whatever files they lie in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mllm import weight_files, weight_mixing
from mllm.assemble import assemble_checkpoint
from mllm.checkpoints import is_complete
from mllm.errors import CheckpointError, OptionError
from mllm.testing import save_tiny_parts, tiny_llm, tiny_tokenizer
from mllm.weight_mixing import mix_checkpoints

PROGRAM = Path(__file__).parents[1] / "scripts" / "mix_weights.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [_saved(root / str(seed), seed) for seed in range(3)]


def _saved(path: Path, seed: int, *, dtype=torch.float32, shard: str = "50GB", **fields) -> Path:
    """A language model as if it had been tuned from the others' start."""
    words = tiny_tokenizer()
    model = tiny_llm(vocab_size=len(words) + 8, **fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    words.save_pretrained(path)
    return path


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def _change(path: Path, name: str, change) -> None:
    """Change a file of JSON, or the tensors of the only weight file."""
    file = path / name
    if name.endswith(".json"):
        fields = json.loads(file.read_text())
        change(fields)
        file.write_text(json.dumps(fields))
        return
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.5, 0.25, 0.25), (1.0, 1.0, -1.0)])
def test_the_sum_in_float64(models, tmp_path, weights):
    chosen = models[: len(weights)]
    report = mix_checkpoints(chosen, weights, tmp_path / "out")
    found, parts = _weights(tmp_path / "out"), [_weights(model) for model in chosen]
    assert found.keys() == parts[0].keys()
    for name, value in found.items():
        expected = torch.zeros(value.shape, dtype=torch.float64)
        for weight, part in zip(weights, parts, strict=True):
            expected += weight * part[name].double()
        assert torch.equal(value, expected.float()), name
    assert report.num_parameters == sum(value.numel() for value in found.values())
    assert report.num_tensors == len(found)


def test_the_whole_share_is_the_model_itself(models, tmp_path):
    mix_checkpoints(models[:2], (1.0, 0.0), tmp_path / "out")
    for name, value in _weights(models[0]).items():
        assert torch.equal(_weights(tmp_path / "out")[name], value), name


def test_what_comes_out_is_a_language_model(models, tmp_path):
    mix_checkpoints(models[:2], (0.5, 0.5), tmp_path / "out")
    assert is_complete(tmp_path / "out", kind="model")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()
    record = json.loads((tmp_path / "out" / "complete.json").read_text())
    assert record["mixed_from"]["weights"] == [0.5, 0.5]
    a, b = (AutoModelForCausalLM.from_pretrained(path) for path in models[:2])
    ours, theirs, other = (dict(one.named_parameters()) for one in (model, a, b))
    for name, value in ours.items():
        torch.testing.assert_close(value, (theirs[name] + other[name]) / 2)


def test_shards_change_nothing(models, tmp_path, monkeypatch):
    """Neither those that are read nor those that are written, nor in how many slices a tensor is read."""
    whole = tmp_path / "whole"
    mix_checkpoints(models[:2], (0.25, 0.75), whole)
    sharded = _saved(tmp_path / "sharded", 1, shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    monkeypatch.setattr(weight_mixing, "SLICE_NUMBERS", 50)
    report = mix_checkpoints([models[0], sharded], (0.25, 0.75), tmp_path / "out", shard_bytes=30_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == report.num_files > 2
    # A file is larger than it may be only where it has one tensor.
    assert all(
        sum(value.nbytes for value in load_file(one).values()) <= 30_000 or len(load_file(one)) == 1 for one in files
    )
    expected, found = _weights(whole), _weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    index = json.loads((tmp_path / "out" / weight_files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in again.items())


def test_no_more_than_a_slice_of_a_tensor_is_read(models, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_mixing, "SLICE_NUMBERS", 64)
    read, largest = weight_files.StoredTensor.read, []

    def watched(tensor, rows):
        piece = read(tensor, rows)
        largest.append(piece.numel() / max(64, piece[0].numel()))
        return piece

    monkeypatch.setattr(weight_files.StoredTensor, "read", watched)
    mix_checkpoints(models[:2], (0.5, 0.5), tmp_path / "out")
    assert len(largest) > 100 and max(largest) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(models, tmp_path, dtype):
    """0.9 a + 0.1 b of numbers near to one another would not survive sums in half precision."""
    halves = [_saved(tmp_path / str(seed), seed, dtype=dtype) for seed in range(2)]
    mix_checkpoints(halves, (0.9, 0.1), tmp_path / "same")
    mix_checkpoints(halves, (0.9, 0.1), tmp_path / "wide", dtype="float32")
    a, b = (_weights(path) for path in halves)
    same, wide = _weights(tmp_path / "same"), _weights(tmp_path / "wide")
    for name, value in same.items():
        expected = 0.9 * a[name].double() + 0.1 * b[name].double()
        assert torch.equal(value, expected.to(dtype)), name
        assert torch.equal(wide[name], expected.float()), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto").dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "same", dtype="auto").dtype == dtype


def test_a_copy_of_tied_weights_is_left_out(tmp_path):
    """Some programs save it, others do not."""
    plain, copied = (_saved(tmp_path / str(seed), seed, tied=True) for seed in range(2))

    def add_copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _change(copied, "model.safetensors", add_copy)
    mix_checkpoints([copied, plain], (0.5, 0.5), tmp_path / "out")
    assert _weights(tmp_path / "out").keys() == _weights(plain).keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight

    _change(copied, "model.safetensors", lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="lm_head.weight is not equal to model.embed_tokens.weight"):
        mix_checkpoints([plain, copied], (0.5, 0.5), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_composed_models(tmp_path):
    parts = save_tiny_parts(tmp_path)
    paths = [assemble_checkpoint(tmp_path / f"model-{seed}", **parts, seed=seed) for seed in range(2)]
    mix_checkpoints(paths, (0.5, 0.5), tmp_path / "out")
    found, (a, b) = _weights(tmp_path / "out"), map(_weights, paths)
    name = "model.image_tower.connector.linear_1.weight"
    torch.testing.assert_close(found[name], (a[name] + b[name]) / 2)
    assert (tmp_path / "out" / "processor_config.json").is_file()


def test_tensors_of_unequal_names(models, tmp_path):
    other = _saved(tmp_path / "other", 1)
    _change(other, "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match="in one alone, such as model.norm.weight"):
        mix_checkpoints([models[0], other], (0.5, 0.5), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_tensors_of_unequal_shapes(models, tmp_path):
    other = _saved(tmp_path / "other", 1)

    def cut(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()

    _change(other, "model.safetensors", cut)
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight has shape"):
        mix_checkpoints([models[0], other], (0.5, 0.5), tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda fields: fields.update(num_attention_heads=2), "num_attention_heads"),
        ("config.json", lambda fields: fields["rope_parameters"].update(rope_theta=5.0), "rope_parameters"),
        ("tokenizer.json", lambda fields: fields["added_tokens"][0].update(content="<other>"), "differently"),
        ("model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), "no numbers"),
    ],
)
def test_models_that_do_not_belong_together(models, tmp_path, file, change, message):
    other = _saved(tmp_path / "other", 1)
    _change(other, file, change)
    with pytest.raises(CheckpointError, match=message):
        mix_checkpoints([models[0], other], (0.5, 0.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_says_nothing_of_the_weights_may_differ(models, tmp_path):
    other = _saved(tmp_path / "other", 1)
    _change(other, "config.json", lambda fields: fields.update(eos_token_id=3, use_cache=False, dtype="bfloat16"))
    mix_checkpoints([models[0], other], (0.5, 0.5), tmp_path / "out")
    ours, first = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", models[0]))
    assert ours == first


def test_numbers_that_cannot_be_mixed_have_to_be_equal(tmp_path):
    """Three bytes stand behind the wider numbers, or these would not lie at multiples of their own width."""
    paths = [_saved(tmp_path / str(seed), seed) for seed in range(2)]
    whole = {"steps": torch.tensor(3), "a_mask": torch.tensor([True, False, True])}
    for path in paths:
        _change(path, "model.safetensors", lambda tensors: tensors.update(whole))
    mix_checkpoints(paths, (0.5, 0.5), tmp_path / "out")
    found, (a, b) = _weights(tmp_path / "out"), map(_weights, paths)
    for name, value in found.items():
        assert torch.equal(value, whole[name] if name in whole else (a[name] + b[name]) / 2), name
        assert value.data_ptr() % value.itemsize == 0
    _change(paths[1], "model.safetensors", lambda tensors: tensors.update(steps=torch.tensor(4)))
    with pytest.raises(CheckpointError, match="steps of type torch.int64 differs"):
        mix_checkpoints(paths, (0.5, 0.5), tmp_path / "other")


def test_broken_files(models, tmp_path):
    other = _saved(tmp_path / "other", 1, shard="20KB")
    shard = sorted(other.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=shard.name):
        mix_checkpoints([models[0], other], (0.5, 0.5), tmp_path / "out")
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        mix_checkpoints([models[0], other], (0.5, 0.5), tmp_path / "out")
    index = other / weight_files.INDEX
    index.unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        mix_checkpoints([models[0], other], (0.5, 0.5), tmp_path / "out")


def test_an_index_that_does_not_fit_its_files(models, tmp_path):
    other = _saved(tmp_path / "other", 1, shard="20KB")

    def forget(fields):
        fields["weight_map"].pop("model.norm.weight")

    _change(other, weight_files.INDEX, forget)
    with pytest.raises(CheckpointError, match="its tensors are not those of"):
        mix_checkpoints([models[0], other], (0.5, 0.5), tmp_path / "out")


@pytest.mark.parametrize("weights", [(0.5,), (0.5, 0.6), (float("nan"), 1.0), (float("inf"), float("-inf"))])
def test_weights_that_are_no_mixture(models, tmp_path, weights):
    with pytest.raises(OptionError, match="weights"):
        mix_checkpoints(models[:2], weights, tmp_path / "out")


def test_nothing_is_overwritten(models, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        mix_checkpoints(models[:2], (0.5, 0.5), tmp_path / "out")
    with pytest.raises(OptionError, match="one of float64, float32, bfloat16, float16"):
        mix_checkpoints(models[:2], (0.5, 0.5), tmp_path / "other", dtype="int8")


@pytest.mark.slow
def test_the_program(models, tmp_path):
    done = _run(models[0], models[1], "--beta", "0.25", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    mix_checkpoints(models[:2], (0.25, 0.75), tmp_path / "expected")
    with safe_open(str(tmp_path / "expected" / weight_files.SINGLE), "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(torch.equal(value, expected[name]) for name, value in _weights(tmp_path / "out").items())
    refused = _run(*models, "--beta", "0.25", "--out", tmp_path / "other")
    assert refused.returncode == 2 and "--weights" in refused.stderr and "Traceback" not in refused.stderr


def _run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
