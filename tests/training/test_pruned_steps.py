"""The option `pruner` of a fine-tuning: steps see fewer visual tokens, and nothing else does."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from mllm import load_model, load_processor
from mllm.data.collate import PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.errors import OptionError
from mllm.load import merged
from mllm.pruning import Uniform
from mllm.testing import tiny_model
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.training.pruned_steps import StepPruner, check_trainable

PARTS = {"image.connector": "full", "text": {"mode": "lora", "rank": 4}}
METHODS = ("divprune", "hired", "random", "tome", "uniform", "visionzip")
"""Those that work in front of the language model."""


def test_each_step_has_a_budget_of_its_own():
    shares = StepPruner("uniform", 0.3, 1.0)
    drawn = [shares.at(step, seed=1).tokens for step in range(200)]
    assert drawn == [shares.at(step, seed=1).tokens for step in range(200)]
    assert all(0.3 <= share < 1 for share in drawn) and min(drawn) < 0.35 and max(drawn) > 0.95
    assert drawn[:5] != [shares.at(step, seed=2).tokens for step in range(5)]
    counts = {StepPruner("uniform layer=0", 2, 4).at(step, seed=1).tokens for step in range(50)}
    assert counts == {2, 3, 4}
    assert StepPruner("uniform", 0.5, 0.5).at(7, seed=0) == Uniform(tokens=0.5)
    assert StepPruner("uniform", 1e-6, 1e-6).at(7, seed=0) == Uniform(tokens=1e-6)
    assert StepPruner("uniform", 1.0, 1.0).at(7, seed=0) is None


def test_steps_see_fewer_tokens_and_validation_sees_all(train, rows, assembled, tmp_path):
    """The losses are those of the model itself, inside the pruner's block and outside."""
    options = {"per_device_train_batch_size": 12, "learning_rate": 0.0, "max_steps": 1, "logging_steps": 1}
    validation = {"eval_data": [str(rows)], "eval_strategy": "steps", "eval_steps": 1}
    pruner = {"method": "uniform", "tokens": 2}
    run = train(tmp_path / "run", parts=PARTS, pruner=pruner, **options, **validation)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = {name: value for line in lines for name, value in line.items()}

    model, processor = load_model(assembled).eval(), load_processor(assembled)
    examples = Examples(open_mixture(read_mixture([str(rows)])), processor)
    batch = PaddingCollator(processor)([examples[number] for number in range(len(examples))])
    with torch.no_grad():
        whole = float(model(**batch, use_cache=False).loss)
        with Uniform(tokens=2)(model):
            pruned = float(model(**batch, use_cache=False).loss)
    assert abs(whole - pruned) > 1e-4
    assert logged["loss"] == pytest.approx(pruned, abs=2e-5)
    assert logged["eval/loss"] == pytest.approx(whole, abs=2e-5)


def test_a_run_that_was_stopped_goes_on_with_the_same_budgets(train, tmp_path):
    options = {
        "parts": PARTS, "pruner": {"method": "divprune", "tokens": [0.25, 1.0]}, "max_steps": 6,
        "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    straight = train(tmp_path / "straight", **options)
    stopped = shutil.copytree(straight, tmp_path / "stopped")
    shutil.rmtree(stopped / "checkpoint-6")
    shutil.rmtree(stopped / "final")
    train(stopped, **options)
    one, other = (merged(load_model(run / "final")).state_dict() for run in (straight, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS)
def test_methods_in_front_of_the_language_model_train_it(train, tmp_path, method):
    """Packed, with a trained encoder, whose attention some of them read, and in chunks of its media."""
    options = {"batching": "packed", "pack_length": 110, "per_device_train_batch_size": None, "encoder_chunk": 2}
    parts = {**PARTS, "image.encoder": "full"}
    pruned = train(tmp_path / "run", parts=parts, pruner={"method": method, "tokens": 2}, **options)
    whole = train(tmp_path / "whole", parts=parts, **options)
    one, other = (merged(load_model(run / "final")).state_dict() for run in (pruned, whole))
    assert all(bool(value.isfinite().all()) for value in one.values())
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_with_a_cache_of_features(train, tmp_path):
    """A frozen encoder is read once, for as many steps as there are, to the same end as without a cache."""
    options = {"parts": PARTS, "pruner": {"method": "divprune", "tokens": [1, 4]}}
    cached = train(tmp_path / "cached", feature_cache="features", **options)
    plain = train(tmp_path / "plain", **options)
    one, other = (merged(load_model(run / "final")).state_dict() for run in (cached, plain))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5, msg=name)


def test_a_stock_model_is_trained_with_fewer_tokens(train, tmp_path):
    base = save_stock_checkpoint(tmp_path / "base", "llava")
    options = {"model": str(base), "parts": {"image.connector": "full"}}
    found = {
        name: train(tmp_path / name, **options, pruner=pruner) / "final"
        for name, pruner in {"pruned": {"method": "uniform", "tokens": 1}, "whole": None}.items()
    }
    one, other = (AutoModelForMultimodalLM.from_pretrained(final).state_dict() for final in found.values())
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruner": "divprune"}, "a mapping with `method`"),
        ({"pruner": {"method": "divprune"}}, "`tokens`: a number"),
        ({"pruner": {"tokens": 3}}, "a mapping with `method`"),
        ({"pruner": {"method": "divprune", "tokens": [3, 1]}}, "the least and the most"),
        ({"pruner": {"method": "divprune", "tokens": [0.5, 3]}}, "of one kind"),
        ({"pruner": {"method": "divprune", "tokens": [0.5, 1.5]}}, "tokens = 1.5"),
        ({"pruner": {"method": "divprune", "tokens": 0}}, "tokens"),
        ({"pruner": {"method": "divprune", "tokens": True}}, "tokens"),
        ({"pruner": {"method": "divprun", "tokens": 3}}, "one of crossget, divprune"),
        ({"pruner": {"method": "visionzip", "tokens": 3, "contextual": 2}}, "contextual"),
        ({"pruner": {"method": "visiondrop", "tokens": 3}}, "between layers of the language model"),
        ({"pruner": {"method": "crossget", "tokens": 3}}, "inside the encoder"),
        ({"pruner": {"method": "visionzip", "tokens": 3}, "feature_cache": "features"}, "asks the encoder"),
        ({"pruner": {"method": "divprune", "tokens": 3}, "cross_tokens": {"r": 1}}, "a pruner of their own"),
    ],
)
def test_wrong_options_are_refused(train, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        train(tmp_path / "run", parts=PARTS, **options)
    assert not (tmp_path / "run" / "final").exists()


def test_a_preference_training_is_refused(prefer, tmp_path):
    with pytest.raises(OptionError, match="a preference training"):
        prefer(tmp_path / "run", pruner={"method": "divprune", "tokens": 3})


def test_flash_attention_that_runs_again_is_refused(tmp_path):
    """Its second run would take the gaps between positions for the ends of packed rows."""
    model, _ = tiny_model(tmp_path)
    pruner = StepPruner("divprune", 3, 3)
    check_trainable(model, pruner, is_checkpointed=True)
    model.model.get_decoder().config._attn_implementation = "flash_attention_2"
    check_trainable(model, pruner, is_checkpointed=False)
    with pytest.raises(OptionError, match="flash attention"):
        check_trainable(model, pruner, is_checkpointed=True)
