"""A connector that reads questions gets each medium's own: alone == in a batch == packed == in a conversation."""

from pathlib import Path

import pytest
import torch

from mllm import load_model, load_processor
from mllm.assemble import assemble_checkpoint
from mllm.data.collate import PackingCollator, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.inference.prompt import encode_prompt, model_inputs
from mllm.load import merged
from mllm.models.segment_attention import isolate_segments
from mllm.testing import save_tiny_parts, save_tiny_rows, tiny_tokenizer

SMALL = {"layers": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 10, "num_queries": 3}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    """Whose Q-Former reads questions with a tokenizer of its own. Dropout would make every run another."""
    root = tmp_path_factory.mktemp("asking")
    tiny_tokenizer("gpt_neox").save_pretrained(root / "words")
    connector = {"type": "instruct_qformer", **SMALL, "dropout": 0.0, "tokenizer": str(root / "words")}
    return assemble_checkpoint(root / "model", **save_tiny_parts(root, image={"connector": connector}))


@pytest.fixture(scope="module")
def model(model_path):
    """With queries and words that differ enough to be told apart by what comes out."""
    model = load_model(model_path).eval()
    for parameter in model.model.image_tower.connector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def examples(model_path, tmp_path_factory) -> Examples:
    """Rows of no, one and two images, each with a question of its own."""
    path = save_tiny_rows(tmp_path_factory.mktemp("rows"), 7, num_images=lambda number: number % 3)
    return Examples(open_mixture(read_mixture([str(path)])), load_processor(model_path))


def _loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    connector = model.model.image_tower.connector
    return loss.detach(), {name: one.grad.clone() for name, one in connector.named_parameters()}


def _assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_packed_and_padded_rows_give_what_they_give_alone(model, examples):
    rows = [example for example in examples if example.row.media]
    padded, packed = PaddingCollator(examples.processor), PackingCollator(examples.processor)
    batch = padded(rows)
    media = sum(len(row.row.media) for row in rows)
    assert batch["image_question_ids"].shape[0] == media and len(batch["image_question_ids"].unique(dim=0)) > 1
    expected = _loss_and_gradients(model, batch)
    alone = [_loss_and_gradients(model, padded([row])) for row in rows]
    weights = torch.tensor([float((row.labels[1:] != -100).sum()) for row in rows])
    mean = sum(weight * loss for weight, (loss, _) in zip(weights, alone, strict=True)) / weights.sum()
    torch.testing.assert_close(mean, expected[0], rtol=0, atol=1e-5)
    isolate_segments(model, longest=max(len(row.input_ids) for row in rows))
    _assert_same(_loss_and_gradients(model, {**packed(rows), "use_cache": False}), expected)
    swapped = {**batch, "image_question_ids": batch["image_question_ids"].flip(0)}
    swapped["image_question_mask"] = batch["image_question_mask"].flip(0)
    with pytest.raises(AssertionError):  # so the comparison sees another medium's question
        _assert_same(_loss_and_gradients(model, swapped), expected)


def test_a_conversation_asks_what_its_row_asks(model, examples):
    """Prompts that are answered together give what each gives alone."""
    rows = [example for example in examples if example.row.media]
    prompts = [encode_prompt(examples.processor, _as_asked(row.row)) for row in rows]
    together = model_inputs(examples.processor, prompts, device=model.device)
    trained = PaddingCollator(examples.processor)(rows)
    for name in ("image_question_ids", "image_question_mask"):
        assert torch.equal(together[name], trained[name])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    answers = model.generate(**together, **settings)[:, -4:]
    beams = model.generate(**together, **settings, num_beams=2)[:, -4:]
    for number, prompt in enumerate(prompts):
        inputs = model_inputs(examples.processor, [prompt], device=model.device)
        assert model.generate(**inputs, **settings)[0, -4:].tolist() == answers[number].tolist()
        assert model.generate(**inputs, **settings, num_beams=2)[0, -4:].tolist() == beams[number].tolist()


def _as_asked(row) -> list[dict]:
    """The messages of a row before its answer, with the files in them."""
    files = iter(row.media)
    return [
        {
            **message,
            "content": [
                item if item["type"] == "text" else {"type": "image", "image": next(files).path}
                for item in message["content"]
            ],
        }
        for message in row.messages[:-1]
    ]


@pytest.mark.slow
def test_cached_features_are_asked_about_too(train, model_path, tmp_path):
    data = save_tiny_rows(tmp_path / "rows", 6, num_images=lambda number: number % 3)
    options = {"model": str(model_path), "data": [str(data)], "parts": {"image.connector": "full"}, "optim": "sgd"}
    train(tmp_path / "plain", **options)
    train(tmp_path / "cached", **options, feature_cache=str(tmp_path / "features"))
    _assert_same_weights(tmp_path / "plain", tmp_path / "cached")


def test_a_rank_without_media_asks_nothing(train, model_path, lopsided_rows, two_ranks, tmp_path):
    """And has a gradient for every parameter all the same, words included: else the ranks would wait for ever."""
    options = {"model": str(model_path), "data": [str(lopsided_rows)], "parts": {"image.connector": "full"}}
    options |= {"optim": "sgd", "max_steps": 3}
    train(tmp_path / "one", **options, per_device_train_batch_size=4)
    two_ranks(_train_two, train, tmp_path / "two", options)
    _assert_same_weights(tmp_path / "one", tmp_path / "two")


def _train_two(train, directory: Path, options: dict) -> None:
    train(directory, **options)


def _assert_same_weights(one: Path, other: Path) -> None:
    expected, found = (merged(load_model(path / "final")).state_dict() for path in (one, other))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)
