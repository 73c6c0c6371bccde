"""Preference training is the same however its pairs are batched, and encodes each picture once.

Padded == packed, accumulate 8x1 == 1x8, a picture that sides share == the picture repeated, resumed == straight.
"""

import json
import shutil
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from safetensors.torch import load_file

from mllm import load_model
from mllm.load import merged
from mllm.models.parts import own_modules, parts_of
from mllm.models.supervised import SHARES_IMAGES
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_stock import STOCK_FAMILIES
from mllm.training import batching
from mllm.training.preference import MultimodalDPOTrainer

LORA = {"mode": "lora", "rank": 4}
BESIDE_LORA = {"image.connector": "full", "text": LORA}
FULL = {"image.connector": "full", "text": "full"}
PACKED = {"batching": "packed", "pack_length": 300, "per_device_train_batch_size": None}
STOCK_IMAGES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl", "gemma3")
ALL = {"image.encoder": "full", "image.connector": "full", "text": "full"}
# Larger steps than the rate says, so that policy and reference part, and the same for the gradient's every digit.
STEPS = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 3}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Checkpoints of stock families."""
    known: dict[str, Path] = {}

    def save(family: str) -> str:
        if family not in known:
            known[family] = save_stock_checkpoint(tmp_path_factory.mktemp("stock") / family, family)
        return str(known[family])

    return save


@pytest.fixture
def encoder_calls(monkeypatch) -> dict[str, list[int]]:
    """How many pictures each call of an image encoder had, by whose it was, in the runs of a test."""
    calls: dict[str, list[int]] = {"policy": [], "reference": []}
    train_from = MultimodalDPOTrainer.train_from

    def watched(trainer, checkpoint):
        for name, model in (("policy", trainer.model), ("reference", trainer.reference_model)):
            if model is not None:
                _watch(model, calls[name])
        train_from(trainer, checkpoint)

    monkeypatch.setattr(MultimodalDPOTrainer, "train_from", watched)
    return calls


def _watch(model, calls: list[int]) -> None:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Qwen-VL's encoder has its connector inside, so that its modules come one by one: the first sees the pictures.
    first = own_modules(plain, parts_of(plain)["image.encoder"])[0]
    plain.get_submodule(first).register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )


@pytest.mark.parametrize(
    ("preset", "parts"),
    [("rdpo", BESIDE_LORA), pytest.param("rdpo", FULL, marks=slow), pytest.param("mdpo", BESIDE_LORA, marks=slow)],
    ids=["rdpo", "rdpo in full", "mdpo"],
)
def test_accumulated_equals_whole(prefer, tmp_path, preset, parts):
    """Eight pairs, in one micro-batch or in eight."""
    options = {"preset": preset, "parts": parts, **STEPS}
    whole = prefer(tmp_path / "whole", per_device_train_batch_size=8, **options)
    cut = prefer(tmp_path / "cut", per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    _assert_same_run(whole, cut)


@pytest.mark.parametrize("preset", ["rdpo", *(pytest.param(name, marks=slow) for name in ("dpo", "mdpo", "vdpo"))])
def test_packed_equals_padded(prefer, tmp_path, preset):
    options = {"preset": preset, "parts": BESIDE_LORA, **STEPS}
    padded = prefer(tmp_path / "padded", per_device_train_batch_size=8, **options)
    packed = prefer(tmp_path / "packed", gradient_accumulation_steps=100, **PACKED, **options)
    _assert_same_run(padded, packed)


@slow
def test_pairs_of_like_length_together_are_the_same_pairs(prefer, tmp_path):
    options = {"preset": "rdpo", "parts": BESIDE_LORA, **STEPS, "gradient_accumulation_steps": 4}
    _assert_same_run(prefer(tmp_path / "random", **options), prefer(tmp_path / "length", batching="length", **options))


@slow
def test_recomputed_activations_change_nothing(prefer, tmp_path):
    options = {"preset": "rdpo", **STEPS}
    parts = {"image.connector": "full", "text": {**LORA, "checkpointing": True}}
    kept = prefer(tmp_path / "kept", parts=BESIDE_LORA, **options)
    _assert_same_run(kept, prefer(tmp_path / "recomputed", parts=parts, **options))


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("composed", BESIDE_LORA),
        pytest.param("composed", {"image.encoder": LORA, **BESIDE_LORA}, marks=slow),
        pytest.param("composed", FULL, marks=slow),
        pytest.param("llava", {"text": LORA}, marks=slow),
        ("qwen3_vl", {"text": LORA}),
        *(pytest.param(family, BESIDE_LORA, marks=slow) for family in SHARES_IMAGES if family in STOCK_FAMILIES),
    ],
    ids=str,
)
def test_a_shared_picture_is_the_repeated_one(prefer, stock, tmp_path, monkeypatch, family, parts):
    options = {"preset": "rdpo", "parts": parts, **STEPS, "per_device_train_batch_size": 4}
    if family != "composed":
        options["model"] = stock(family)
    shared = prefer(tmp_path / "shared", **options)
    monkeypatch.setattr(batching, "takes_shared_media", lambda model: False)
    _assert_same_run(shared, prefer(tmp_path / "repeated", **options))


@pytest.mark.parametrize(
    ("family", "preset", "parts", "policy", "reference"),
    [
        ("composed", "dpo", BESIDE_LORA, [8], []),
        ("composed", "rdpo", BESIDE_LORA, [16], []),
        pytest.param("composed", "vdpo", BESIDE_LORA, [16], [], marks=slow),
        pytest.param("composed", "rdpo", ALL, [16], [16], marks=slow),
        ("composed", "rdpo", FULL, [], [16]),
        ("llava", "rdpo", {"text": LORA}, [16], []),
        pytest.param("llava", "rdpo", BESIDE_LORA, [16, 16], [], marks=slow),
        pytest.param("llava", "rdpo", {"text": "full"}, [], [16], marks=slow),
        pytest.param("gemma3", "rdpo", {"text": LORA}, [16], [], marks=slow),
        pytest.param("qwen3_vl", "rdpo", {"text": LORA}, [ANY], [], marks=slow),  # in patches
    ],
    ids=str,
)
def test_a_frozen_encoder_sees_each_picture_once(
    prefer, stock, tmp_path, encoder_calls, family, preset, parts, policy, reference
):
    """Eight pairs in a step: what policy and reference, chosen and rejected share is encoded in one call."""
    options = {"preset": preset, "parts": parts, "max_steps": 1, "per_device_train_batch_size": 8}
    prefer(tmp_path / "run", **options | ({} if family == "composed" else {"model": stock(family)}))
    assert encoder_calls == {"policy": policy, "reference": reference}


@pytest.mark.parametrize(
    "family", ["idefics3", *(pytest.param(family, marks=slow) for family in STOCK_IMAGES if family != "idefics3")]
)
def test_every_stock_family_begins_at_a_coins_toss(prefer, stock, tmp_path, family):
    """Policy and reference see the same, whether pictures are shared or repeated."""
    run = prefer(tmp_path / "run", model=stock(family), parts={"text": LORA}, preset="rdpo", max_steps=1)
    assert _log(run)[0]["loss"] == pytest.approx(2 * 0.6931471805599453, abs=1e-6)


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (BESIDE_LORA, {}),
        pytest.param(BESIDE_LORA, {"gradient_accumulation_steps": 3}, marks=slow),
        pytest.param(BESIDE_LORA, PACKED, marks=slow),
        pytest.param(BESIDE_LORA, {"dataloader_num_workers": 1}, marks=slow),
        pytest.param({"text": {**LORA, "dropout": 0.3}}, {"disable_dropout": False, "preset": "mdpo"}, marks=slow),
        pytest.param(FULL, {}, marks=slow),
    ],
    ids=["lora", "accumulated", "packed", "with a data worker", "with dropout", "full"],
)
def test_resumed_equals_straight(prefer, tmp_path, parts, options):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "parts": parts, **options}
    straight = prefer(tmp_path / "straight", **options)
    stopped = shutil.copytree(straight, tmp_path / "stopped")
    for path in (stopped / "checkpoint-6", stopped / "final"):
        shutil.rmtree(path)
    prefer(stopped, **options)
    for name in (path.name for path in (straight / "final").glob("*.safetensors")):
        before, after = (load_file(run / "final" / name) for run in (straight, stopped))
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
    logs = [[_compared(line) for line in _log(run) if "loss" in line] for run in (straight, stopped)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def _log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def _compared(line: dict) -> dict:
    """The figures of a line of the log that are no clock's."""
    kinds = ("loss", "grad_norm", "rewards", "margins", "accuracies", "log_probs", "kl", "pairs", "learning_rate")
    return {name: value for name, value in line.items() if name.startswith(kinds)}


def _assert_same_run(one: Path, other: Path) -> None:
    """Losses, rewards, margins and gradients of every step, and the weights at the end."""
    logs = [[line for line in _log(run) if "loss" in line] for run in (one, other)]
    assert len(logs[0]) == len(logs[1]) == STEPS["max_steps"]
    for first, second in zip(*logs, strict=True):
        assert len(_compared(first)) > 10
        assert _compared(second) == pytest.approx(_compared(first), abs=1e-4)
    assert logs[0][-1]["margins/text"] != pytest.approx(0.0, abs=1e-3), "nothing was learned, so nothing compared"
    weights = [merged(load_model(run / "final")).state_dict() for run in (one, other)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-5, msg=name)
