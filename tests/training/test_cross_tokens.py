"""Cross tokens of CrossGET: learned while a model is fine-tuned, saved beside it, read by the pruner."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mllm import load_model
from mllm.errors import OptionError
from mllm.pruning import CrossGet
from mllm.pruning.cross_tokens import CROSS_TOKENS, alignment_loss, load_cross_tokens, parted, save_cross_tokens
from mllm.pruning.first_tokens import first_places
from mllm.testing import tiny_model
from mllm.testing_stock import tiny_stock_batch, tiny_stock_model
from mllm.training.cross_tokens import (
    CrossTokenOptions,
    CrossTokenTuning,
    layer_repeats,
    means_of_rows,
    views_of_rows,
)

OPTIONS = {"tokens": 3, "weight": 0.5}
PARTS = {
    "frozen encoder": {"image.connector": "full"},
    "all": {"image.encoder": "full", "image.connector": "full", "text": "full"},
    "lora": {"image.connector": "full", "text": {"mode": "lora", "rank": 4}},
}


def kl_div(log_first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """As the published code calls it: KL(second || first), as a mean over pairs."""
    return torch.nn.functional.kl_div(log_first, second, reduction="batchmean")


def test_alignment_is_the_published_one_or_that_of_jensen_and_shannon():
    first, second = torch.randn(2, 6, 10, dtype=torch.float64)
    p, q = first.softmax(-1), second.softmax(-1)
    mean = (p + q) / 2
    published = 0.5 * (kl_div(p.log(), mean) + kl_div(q.log(), mean))
    usual = 0.5 * (kl_div(mean.log(), p) + kl_div(mean.log(), q))
    torch.testing.assert_close(alignment_loss(first, second), published, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alignment_loss(first, second, kl="usual"), usual, rtol=1e-9, atol=1e-9)
    assert float(alignment_loss(first, first)) == pytest.approx(0.0, abs=1e-12)


def test_layers_of_an_encoder_are_spread_over_those_of_a_language_model():
    assert layer_repeats(24, 32).tolist() == [32 * (i + 1) // 24 - 32 * i // 24 for i in range(24)]
    assert int(layer_repeats(23, 32).sum()) == 32 and int(layer_repeats(3, 2).sum()) == 2


def test_pictures_of_a_row_count_as_their_mean():
    ids = torch.tensor([[9, 9, 1, 9, 9], [1, 1, 1, 1, 1], [1, 9, 9, 1, 1]])
    views = views_of_rows(ids, 9, None) // 2
    assert views.tolist() == [2, 0, 1]
    assert views_of_rows(ids[:1], 9, (3, 2)).tolist() == [2, 2]
    carried = torch.tensor([[[1.0], [3.0], [7.0]]])
    assert means_of_rows(carried, views)[0, :, 0].tolist() == [2.0, 7.0]


def test_first_tokens_are_those_behind_the_padding_and_of_each_segment():
    embeds = torch.zeros(2, 5, 3)
    rows, columns = first_places(embeds, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]), None)
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [2, 0])
    rows, columns = first_places(embeds[:1], None, (2, 3))
    assert (rows.tolist(), columns.tolist()) == ([0, 0], [0, 2])


def tuned_on(model, batch, **options) -> tuple[CrossTokenTuning, torch.Tensor]:
    tuning = CrossTokenTuning(model, CrossTokenOptions(**{**OPTIONS, **options}))
    loss = model(**batch, use_cache=False).loss + tuning.loss(batch)
    loss.backward()
    return tuning, loss


def test_alignment_reaches_the_cross_tokens_alone():
    model = tiny_stock_model("llava").requires_grad_(False)
    batch = tiny_stock_batch(model)
    tuning = CrossTokenTuning(model, CrossTokenOptions(**OPTIONS))
    with tuning.stack:
        for parameter in tuning.tokens.values():
            torch.nn.init.normal_(parameter)
        model.model.multi_modal_projector.requires_grad_(True)
        model(**batch, use_cache=False)
        tuning.loss(batch).backward()
    # Not the connector that projects them; and of the loss of the answers there was nothing.
    assert all(not one.grad.any() for one in model.model.multi_modal_projector.parameters() if one.grad is not None)
    assert all(bool(one.grad.any()) and bool(one.grad.isfinite().all()) for one in tuning.tokens.values())
    # A cross token carries what was before without its gradient: each layer's own learns from its own alignment.
    assert all(bool(row.any()) for row in tuning.tokens["text"].grad)


def test_each_layers_token_carries_the_one_before_without_its_gradient():
    model = tiny_stock_model("llava").requires_grad_(False)
    tuning = CrossTokenTuning(model, CrossTokenOptions(**OPTIONS))
    with tuning.stack:
        model(**tiny_stock_batch(model), use_cache=False)
        carried = {
            "image": tuning.pruner.reading.merging.carried[1],
            "text": tuning.pruner.first_tokens.carried[1],
        }
        for name, token in carried.items():
            (gradient,) = torch.autograd.grad(token.sum(), tuning.tokens[name])
            assert not bool(gradient[0].any()) and bool((gradient[1] == len(token)).all())


def test_answers_teach_the_cross_tokens_of_a_frozen_encoder(tmp_path):
    model = tiny_stock_model("llava").requires_grad_(False)
    tuning, loss = tuned_on(model, tiny_stock_batch(model), weight=0.0)
    tuning.stack.close()
    assert bool(loss.isfinite())
    assert all(bool(one.grad.any()) and bool(one.grad.isfinite().all()) for one in tuning.tokens.values())


def test_a_tuned_model_generates_as_in_training(tmp_path):
    """What the pruner reads from the directory is what the model was trained with."""
    model = tiny_stock_model("llava")
    batch = {name: value for name, value in tiny_stock_batch(model).items() if name != "labels"}
    tuning = CrossTokenTuning(model, CrossTokenOptions(**OPTIONS))
    with tuning.stack, torch.no_grad():
        for parameter in tuning.tokens.values():
            torch.nn.init.normal_(parameter)
        trained = model(**batch).logits
    rest, tokens = parted(model.state_dict())
    save_cross_tokens(tmp_path, tokens)
    fresh = tiny_stock_model("llava")
    fresh.load_state_dict(rest)
    with CrossGet(tokens=3, cross_tokens=str(tmp_path))(fresh), torch.no_grad():
        torch.testing.assert_close(fresh(**batch).logits, trained)
        long = fresh.generate(**{**batch, "attention_mask": torch.ones_like(batch["input_ids"])}, max_new_tokens=3)
    with CrossGet(tokens=3, cross_tokens="zeros")(fresh), torch.no_grad():
        assert not torch.allclose(fresh(**batch).logits, trained)
    assert long.shape[1] == batch["input_ids"].shape[1] + 3


@pytest.mark.parametrize("name", PARTS)
def test_a_run_saves_them_beside_a_model_that_loads_without(train, tmp_path, name):
    final = train(tmp_path / "run", parts=PARTS[name], cross_tokens=dict(OPTIONS)) / "final"
    saved = load_file(final / CROSS_TOKENS)
    assert {one: value.shape for one, value in saved.items()} == {"image": (2, 32), "text": (2, 32)}
    assert all(bool(value.any()) for value in saved.values())
    weights = [one for file in final.glob("*model*.safetensors") for one in load_file(file)]
    assert weights and not any("cross_tokens" in one for one in weights)
    model = load_model(final)
    assert not any("cross_tokens" in one for one, _ in model.named_parameters())
    pruner = CrossGet(tokens=3, cross_tokens=str(final))
    with pruner(model):
        assert torch.equal(pruner.image_cross_tokens(2, 32, model.device), saved["image"])


def test_a_run_that_was_stopped_goes_on_with_them(train, tmp_path):
    options = {
        "parts": PARTS["lora"], "cross_tokens": dict(OPTIONS), "save_strategy": "steps", "save_steps": 2,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    straight = train(tmp_path / "straight", **options)
    stopped = shutil.copytree(straight, tmp_path / "stopped")
    shutil.rmtree(stopped / "checkpoint-4")
    shutil.rmtree(stopped / "final")
    train(stopped, **options)
    one, other = (load_file(run / "final" / CROSS_TOKENS) for run in (straight, stopped))
    early = load_file(straight / "checkpoint-2" / CROSS_TOKENS)
    for name in ("image", "text"):
        assert torch.equal(one[name], other[name]) and not torch.equal(one[name], early[name])


def test_packed_rows_have_a_first_token_for_each_of_them(train, tmp_path):
    packed = {"batching": "packed", "pack_length": 110, "per_device_train_batch_size": None}
    final = train(tmp_path / "run", parts=PARTS["lora"], cross_tokens=dict(OPTIONS), **packed) / "final"
    assert all(
        bool(value.any()) and bool(value.isfinite().all()) for value in load_file(final / CROSS_TOKENS).values()
    )


@pytest.mark.slow
def test_two_ranks_equal_one_process_also_where_one_has_no_picture(train, lopsided_rows, two_ranks, tmp_path):
    """Of the answers' loss; alignment is a mean over the rows of a micro-batch, which are others there."""
    train(tmp_path / "one", per_device_train_batch_size=4, **ranked(lopsided_rows, 0.0))
    two_ranks(train_on_two_ranks, train, lopsided_rows, tmp_path)
    one, two = (load_file(tmp_path / run / "final" / CROSS_TOKENS) for run in ("one", "two"))
    for name in ("image", "text"):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
        assert bool(one[name].any())
    aligned = load_file(tmp_path / "aligned" / "final" / CROSS_TOKENS)
    assert all(bool(value.isfinite().all()) for value in aligned.values())


def train_on_two_ranks(train, rows: Path, root: Path) -> None:
    train(root / "two", **ranked(rows, 0.0))
    train(root / "aligned", **ranked(rows, 0.5))


def ranked(rows: Path, weight: float) -> dict:
    cross_tokens = {"tokens": 3, "weight": weight}
    return {"data": [str(rows)], "optim": "sgd", "max_steps": 5, "parts": PARTS["lora"], "cross_tokens": cross_tokens}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_tokens": {"rr": 3}}, "with some of tokens, r"),
        ({"cross_tokens": {"kl": "odd"}}, "one of reversed, usual"),
        ({"cross_tokens": {"r": 0}}, "r = 0"),
        ({"cross_tokens": {"r": 1}, "feature_cache": "features"}, "feature_cache"),
        ({"cross_tokens": {"r": 1}, "encoder_chunk": 2}, "encoder_chunk"),
    ],
)
def test_wrong_options_are_refused(train, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        train(tmp_path / "run", parts=PARTS["all"], **options)


def test_a_connector_that_cannot_project_them_is_refused(tmp_path):
    connector = {"type": "perceiver", "num_latents": 3, "depth": 1, "heads": 4, "head_size": 8}
    model, _ = tiny_model(tmp_path, image={"connector": connector})
    with pytest.raises(OptionError, match="alignment loss, and a connector that reads sequences"):
        CrossTokenTuning(model, CrossTokenOptions(**OPTIONS))
    CrossTokenTuning(model, CrossTokenOptions(tokens=3, weight=0.0)).stack.close()


def test_tokens_for_another_encoder_are_refused(train, tmp_path):
    final = train(tmp_path / "run", parts=PARTS["all"], cross_tokens=dict(OPTIONS)) / "final"
    with pytest.raises(OptionError, match="for each layer of this encoder"):
        load_cross_tokens(final, "image", (23, 1024))
