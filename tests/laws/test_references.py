"""The reference is what the run started from, bit for bit, before training and after it."""

import json
import math
from pathlib import Path

import pytest
import torch

from mllm import load_model, load_processor
from mllm.data.collate import PaddingCollator
from mllm.data.collate_pairs import PairCollator
from mllm.data.contrasts import Contrast
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.data.pairs import Pairs
from mllm.errors import CheckpointError, OptionError
from mllm.load import merged
from mllm.testing import save_tiny_parts
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.training.preference import MultimodalDPOTrainer, without_adapters

LORA = {"mode": "lora", "rank": 4}
ADAPTED = {
    "text lora": {"text": LORA},
    "connector full beside it": {"image.connector": "full", "text": LORA},
    "encoder full beside it": {"image.encoder": "full", "image.connector": "full", "text": LORA},
    "all lora": {"image.encoder": LORA, "image.connector": LORA, "text": LORA},
}


@pytest.fixture
def trainer_of(prefer, monkeypatch):
    """Run `train/rdpo.py`; returns its trainer, with the model that was trained still in memory."""
    seen: list[MultimodalDPOTrainer] = []
    train_from = MultimodalDPOTrainer.train_from

    def watched(trainer, checkpoint):
        seen.append(trainer)
        train_from(trainer, checkpoint)

    monkeypatch.setattr(MultimodalDPOTrainer, "train_from", watched)

    def start(output_dir: Path, **options) -> MultimodalDPOTrainer:
        prefer(output_dir, **options)
        return seen[-1]

    return start


@pytest.mark.parametrize("family", ["composed", "llava"])
@pytest.mark.parametrize("parts", ADAPTED.values(), ids=ADAPTED.keys())
def test_without_adapters_the_trained_model_is_the_one_it_was(trainer_of, assembled, tmp_path, parts, family):
    """Also of parts that are trained in full beside adapters: their untrained copy is the reference."""
    base = assembled if family == "composed" else save_stock_checkpoint(tmp_path / "base", family)
    model = trainer_of(tmp_path / "run", model=str(base), parts=parts, max_steps=3).model.eval()
    plain, start = model.get_base_model(), load_model(base)
    kept = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in plain.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    expected = start.state_dict()
    assert kept.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(kept[name], expected[name])] == []
    inputs = _text(start)
    with torch.no_grad(), without_adapters(model):
        said = plain(**inputs).logits
    assert torch.equal(said, start(**inputs).logits)
    with torch.no_grad():
        assert not torch.equal(plain(**inputs).logits, said), "nothing was trained"


@pytest.mark.parametrize("family", ["composed", "llava"])
def test_a_model_that_is_trained_in_full_has_a_reference_of_its_own(trainer_of, assembled, tmp_path, family):
    base = assembled if family == "composed" else save_stock_checkpoint(tmp_path / "base", family)
    parts = {"image.connector": "full", "text": "full"}
    trainer = trainer_of(tmp_path / "run", model=str(base), parts=parts, max_steps=3)
    expected = load_model(base).state_dict()
    for model, is_same in ((trainer.reference_model, True), (trainer.model, False)):
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected) is is_same
    assert not any(parameter.requires_grad for parameter in trainer.reference_model.parameters())


def test_another_checkpoint_is_the_reference_where_it_is_named(prefer, assembled, pairs, tmp_path):
    """The first loss is that of the two models' log-probabilities, also where the policy is adapted."""
    moved = prefer(tmp_path / "moved", parts={"text": "full"}, max_steps=3, learning_rate=3e-2) / "final"
    adapter = prefer(tmp_path / "adapter", parts={"text": LORA}, max_steps=3, learning_rate=3e-2) / "final"
    for number, reference in enumerate((moved, adapter)):
        options = {"preset": "rdpo", "max_steps": 1, "per_device_train_batch_size": 8, "reference": str(reference)}
        run = prefer(tmp_path / f"run-{number}", **options)
        policy, other = (_answers(load_model(path), assembled, pairs) for path in (assembled, reference))
        delta = policy - other
        margins = [0.1 * (delta[:, 0] - delta[:, side]) for side in (1, 2)]
        expected = sum(-torch.nn.functional.logsigmoid(margin).mean().item() for margin in margins)
        assert _first(run)["loss"] == pytest.approx(expected, abs=1e-4)
        assert abs(expected - 2 * math.log(2)) > 1e-3
        assert _first(run)["rewards/contrast"] == pytest.approx(0.1 * delta[:, 2].mean().item(), abs=1e-4)


def test_the_released_trainers_variant_takes_each_models_own_likeliest_tokens(prefer, assembled, pairs, tmp_path):
    """Of the rejected answer and under the retrieved image, the second where the first is the label: methods of the
    released code, not of the paper."""
    reference = prefer(tmp_path / "moved", parts={"text": "full"}, max_steps=3, learning_rate=3e-2) / "final"
    run = prefer(
        tmp_path / "run", max_steps=1, per_device_train_batch_size=8, reference=str(reference), released_log_probs=True
    )
    policy, other = (
        _answers(load_model(path), assembled, pairs, own_tokens_of=(1, 2)) for path in (assembled, reference)
    )
    delta = policy - other
    margins = [0.1 * (delta[:, 0] - delta[:, side]) for side in (1, 2)]
    expected = sum(-torch.nn.functional.logsigmoid(margin).mean().item() for margin in margins)
    assert _first(run)["loss"] == pytest.approx(expected, abs=1e-4)
    plain = _answers(load_model(assembled), assembled, pairs) - _answers(load_model(reference), assembled, pairs)
    assert not torch.allclose(plain, delta, atol=1e-2)


def test_dropout_is_off_on_both_sides_unless_asked_for(prefer, tmp_path):
    parts = {"text": {**LORA, "dropout": 0.5}}
    options = {"preset": "dpo", "parts": parts, "max_steps": 2, "learning_rate": 0.1}
    runs = [
        _log(prefer(tmp_path / f"{name}-{again}", **options, disable_dropout=name == "without"))
        for name in ("without", "with")
        for again in range(2)
    ]
    without, with_dropout = runs[0], runs[2]
    assert without[0]["loss"] == with_dropout[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # adapters begin at 0
    assert without[1]["loss"] != with_dropout[1]["loss"]
    assert without[1]["loss"] == runs[1][1]["loss"]


def test_a_reference_of_another_architecture_is_refused(prefer, assembled, tmp_path):
    from mllm.assemble import assemble_checkpoint

    deeper = assemble_checkpoint(tmp_path / "deeper", **save_tiny_parts(tmp_path / "parts", num_hidden_layers=3))
    message = r"text_config.num_hidden_layers = 3, not 2\nexpected: a checkpoint of the same model"
    for options in ({}, {"dry_run": True}, {"precompute_ref_log_probs": True}):
        with pytest.raises(OptionError, match=message):
            prefer(tmp_path / f"run{len(options)}{len(str(options))}", reference=str(deeper), **options)
    stock = save_stock_checkpoint(tmp_path / "stock", "llava")
    with pytest.raises(OptionError, match="of another architecture than the model"):
        prefer(tmp_path / "other", reference=str(stock))
    with pytest.raises(CheckpointError):
        prefer(tmp_path / "none", reference=str(tmp_path / "nowhere"))
    assert not list(tmp_path.glob("*/run.json"))  # so that the corrected command can begin


def test_a_run_does_not_go_on_with_another_reference(prefer, assembled, tmp_path):
    first = prefer(tmp_path / "first", parts={"text": "full"}, max_steps=1) / "final"
    second = prefer(tmp_path / "second", parts={"text": "full"}, max_steps=2) / "final"
    reference = tmp_path / "reference"
    reference.symlink_to(first)
    run = prefer(tmp_path / "run", reference=str(reference), max_steps=1)
    record = json.loads((run / "run.json").read_text())
    assert record["reference"]["sha256"]
    reference.unlink()
    reference.symlink_to(second)
    with pytest.raises(CheckpointError, match="other reference"):
        prefer(run, reference=str(reference), max_steps=1)


def _text(model) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(10, 20)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}


def _answers(model, base: Path, pairs: Path, own_tokens_of: tuple[int, ...] = ()) -> torch.Tensor:
    """Log-probabilities of the sides of all pairs, from logits, in float64; one row a pair."""
    model, contrast = merged(model).double().eval(), Contrast("retrieved")
    processor = load_processor(base)
    collate = PairCollator(PaddingCollator(processor), contrast=contrast, shares_media=False)
    found = []
    for pair in Pairs(open_mixture(read_mixture([str(pairs)])), processor, contrast=contrast):
        batch = collate([pair])
        labels = batch.pop("labels")
        with torch.no_grad():
            log_probs = model(**batch).logits.log_softmax(-1)[:, :-1]
        labels, is_learned = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        likeliest = log_probs.topk(2).indices
        own = torch.where(likeliest[..., 0] == labels, likeliest[..., 1], likeliest[..., 0])
        for side in own_tokens_of:
            labels[side] = own[side]
        found.append((log_probs.gather(-1, labels[..., None])[..., 0] * is_learned).sum(-1))
    return torch.stack(found)


def _log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def _first(run: Path) -> dict:
    return _log(run)[0]
