"""Training under a pruner that works in front of the language model: from what is kept, however it is batched.

The loss == that of the reference, and only what is kept teaches the connector; packed == padded; media that sides of
a pair share == the media repeated; a rank without media disturbs no one.
"""

import pytest
import torch

from mllm.data.collate import PackingCollator, PaddingCollator
from mllm.data.collate_pairs import PairCollator
from mllm.data.contrasts import Contrast
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.data.pairs import Pairs
from mllm.errors import OptionError
from mllm.models.segment_attention import isolate_segments
from mllm.pruning import FastV, Uniform, VisionZip
from mllm.testing import tiny_model
from mllm.testing_media import save_tiny_media_rows
from mllm.testing_pairs import save_tiny_pairs
from mllm.testing_pruning import (
    NUM_TOKENS,
    KeepsFirst,
    columns_of_items,
    enlarge,
    recomputed,
    tiny_prunable_model,
    watched,
)

POSITIONS = ("original", "compacted")
CONTENTS = ("ita", "", "viti", "aivi", "vt", "ii")
TOWERS = {"audio": {}, "video": {"connector": "linear", "frames": "uniform:3"}}


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    return tiny_prunable_model(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def of_all_kinds(tmp_path_factory):
    """A model that reads images, sounds and videos, and rows with them."""
    model, processor = tiny_model(tmp_path_factory.mktemp("parts"), **TOWERS)
    enlarge(model)
    rows = save_tiny_media_rows(tmp_path_factory.mktemp("media"), CONTENTS)
    examples = Examples(open_mixture(read_mixture([str(rows)])), processor)
    return model, processor, [examples[number] for number in range(len(examples))]


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_training_learns_from_what_is_kept(composed, positions, checkpoints):
    """Of a row whose answer follows its picture at once, too: it follows from the last token that is kept."""
    model = composed[0]
    inputs = _batch(model)
    labels = inputs["input_ids"].clone()
    labels[(labels == model.config.image_token_id) | (inputs["position_ids"] == 0)] = -100
    pruner, given = KeepsFirst(tokens=5, positions=positions), []
    handle = model.model.image_tower.connector.register_forward_hook(lambda _, args, output: given.append(output))
    with watched(model, pruner, columns_of_items(inputs["input_ids"], model.config.image_token_id, [16] * 2)) as seen:
        model.train().zero_grad()
        if checkpoints:
            model.gradient_checkpointing_enable()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        given[0].retain_grad()
        loss.backward()
    model.eval().gradient_checkpointing_disable()
    handle.remove()
    seen.kwargs = {name: one.detach() if isinstance(one, torch.Tensor) else one for name, one in seen.kwargs.items()}
    expected = _loss_of_what_is_left(recomputed(model, seen), labels, seen.kwargs["inputs_embeds"][..., 0].isnan())
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    kept = [item.kept[0].tolist() for row in pruner.statistics.items for item in row]
    assert [(one.abs().sum(-1) > 0).nonzero()[:, 0].tolist() for one in given[0].grad] == kept
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_training_refuses_cuts(composed):
    model = composed[0]
    try:
        with FastV(tokens=10)(model.train()), pytest.raises(OptionError, match="being trained"):
            model(**_batch(model))
    finally:
        model.eval()


@pytest.mark.parametrize("positions", POSITIONS)
def test_packed_equals_padded(of_all_kinds, positions):
    model, processor, examples = of_all_kinds
    pruner = Uniform(tokens=3, positions=positions)
    with pruner(model):
        padded = _loss_and_gradients(model, PaddingCollator(processor)(examples))
        seen = str([item for row in pruner.statistics.items for item in row])
        isolate_segments(model, longest=400)
        packed = _loss_and_gradients(model, PackingCollator(processor)(examples))
        assert str(pruner.statistics.items[0]) == seen
        alone = PackingCollator(processor)(examples[:1])
        torch.testing.assert_close(
            _loss_and_gradients(model, alone)["loss"],
            _loss_and_gradients(model, PaddingCollator(processor)(examples[:1]))["loss"],
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
    _assert_equal(packed, padded)
    assert not torch.allclose(_loss_and_gradients(model, PaddingCollator(processor)(examples))["loss"], padded["loss"])


def test_everything_kept_equals_no_pruner_beside_sounds_and_videos(of_all_kinds):
    model, processor, examples = of_all_kinds
    batch = PaddingCollator(processor)(examples)
    expected = _loss_and_gradients(model, batch)
    with Uniform(tokens=10_000)(model) as pruner:
        _assert_equal(_loss_and_gradients(model, batch), expected)
    assert [[item.num_tokens for item in row] for row in pruner.statistics.items] == [
        [4],
        [],
        [12, 4, 4],
        [4, 12, 4],
        [12],
        [4, 4],
    ]


@pytest.mark.parametrize("texts", [PaddingCollator, PackingCollator])
def test_shared_media_equal_repeated_ones(composed, tmp_path, texts):
    model, processor = composed
    contrast = Contrast("retrieved")
    pairs = Pairs(open_mixture(read_mixture([str(save_tiny_pairs(tmp_path, 4))])), processor, contrast=contrast)
    isolate_segments(model, longest=400)
    found = []
    for is_shared in (True, False):
        collate = PairCollator(texts(processor), contrast=contrast, shares_media=is_shared)
        batch = collate([pairs[number] for number in range(4)])
        with VisionZip(tokens=5)(model) as pruner:
            found.append(model(**batch, returns_log_probs=True, use_cache=False).log_probs)
        assert all(len(item.kept[0]) == 5 and 0 in item.merged_into for row in pruner.statistics.items for item in row)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_a_rank_without_media_is_not_disturbed_by_what_others_drop(composed, monkeypatch):
    """It encodes an item of zeros, to call what they call; marks of what leaves would turn its loss into no number."""
    model = composed[0]
    inputs = {"input_ids": torch.arange(20, 40).view(2, 10), "labels": torch.arange(20, 40).view(2, 10)}
    expected = _loss_and_gradients(model, inputs)
    monkeypatch.setattr("mllm.models.modeling.is_called_together", lambda *args, **kwargs: True)
    with Uniform(tokens=3)(model):
        found = _loss_and_gradients(model, inputs)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=0, atol=0)
    connector = [gradient for name, gradient in found.items() if ".connector." in name]
    assert connector and not any(gradient.any() for gradient in connector)


def _batch(model) -> dict[str, torch.Tensor]:
    """Rows of unequal lengths; in the second a word follows a picture at once."""
    picture = [model.config.image_token_id] * NUM_TOKENS
    rows = [[20, 21, 22, *picture, 23, 24, 25, 26], [27, 28, *picture, 29]]
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)),
    }


def _loss_of_what_is_left(logits: torch.Tensor, labels: torch.Tensor, is_gone: torch.Tensor) -> torch.Tensor:
    """Each label follows from the last column before it that is left."""
    losses = []
    for row, own in enumerate(labels.tolist()):
        for column, label in enumerate(own):
            before = [one for one in range(column) if not is_gone[row, one]]
            if label != -100 and before:
                losses.append(-logits[row, before[-1]].log_softmax(-1)[label])
    return torch.stack(losses).mean()


def _loss_and_gradients(model, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach(), **gradients}


def _assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-5, msg=name)
