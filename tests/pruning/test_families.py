"""Pruners on every family, stock and composed.

Their items are the right ones; everything kept == no pruner; what is left == the prompt with the rest masked.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from mllm.errors import OptionError, RowError
from mllm.models.stock_parts import STOCK_PARTS
from mllm.pruning import Cut, Pruner, Selection, Uniform
from mllm.pruning.anatomy import UNSUPPORTED, items_of_rows
from mllm.pruning.stock_readers import STOCK_READERS
from mllm.testing_images import save_sphinx_encoders
from mllm.testing_stock import tiny_stock_batch, tiny_stock_model
from mllm.testing_visual import VISUAL_BATCHES, composed_visual_batch, visual_batch


@dataclass
class Everything(Pruner):
    """Keeps all tokens, through every step in which they could leave."""

    seen: list = field(default_factory=list)

    def cuts(self, num_layers):
        return (Cut(0, 0), Cut(1, 0))

    def select(self, item, num_layers):
        self.seen.append(item)
        return Selection(torch.arange(len(item.vectors)))

    def select_at_cut(self, row, cut, entered, num_layers):
        return [Selection(torch.arange(len(item))) for item in row.items]


@dataclass
class EverySecond(Pruner):
    """Keeps every second token of each item from a layer on."""

    layer: int = 1

    def cuts(self, num_layers):
        return (Cut(self.layer, self.layer),)

    def select_at_cut(self, row, cut, entered, num_layers):
        return [Selection(torch.arange(0, len(item), 2)) for item in row.items]


QFORMER = {
    "type": "qformer", "num_queries": 3, "layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 32,
    "cross_attention_frequency": 1, "dropout": 0.0,
}  # fmt: skip
LATENTS = {"type": "perceiver", "num_latents": 3, "depth": 1}
COMPOSED: dict[str, Any] = {
    "ours, mlp": {"video": {"connector": "mlp"}},
    "ours, pixel shuffle": {"image": {"connector": "patch_merge", "tiles": {"type": "internvl", "max_tiles": 4}}},
    "ours, pool": {
        "image": {"connector": {"type": "pool", "size": 3}},
        "video": {"connector": {"type": "pool", "over": "grid", "size": 2}},
    },
    "ours, qformer": {
        "image": {"connector": QFORMER},
        "video": {"connector": {**QFORMER, "per": "item", "positions": 8}, "through_image_connector": True},
    },
    "ours, perceiver": {"image": {"connector": LATENTS}},
    "ours, tiles": {"image": {"tiles": "llava_next"}, "video": {"connector": "mlp"}},
    "ours, tiles one by one": {"image": {"tiles": "sphinx"}},
    "ours, several encoders": {"image": {"connector": "streams", "join": "sequence"}},
}


@pytest.fixture(scope="module", params=[*VISUAL_BATCHES, *COMPOSED])
def batch(request, tmp_path_factory):
    """A batch with several pictures (and videos), of each family."""
    if request.param in COMPOSED:
        parts, directory = COMPOSED[request.param], tmp_path_factory.mktemp("parts")
        if "several encoders" in request.param:
            parts = {"image": {**parts["image"], "encoder": save_sphinx_encoders(directory / "eyes")}}
        made = composed_visual_batch(directory, **parts)
    else:
        made = visual_batch(request.param)
    made.model.set_attn_implementation("eager")  # whose masks the references below can add to
    return made


@torch.no_grad()
def test_everything_kept_is_no_pruner(batch):
    expected = batch.model(**batch.inputs).logits
    pruner = Everything()
    is_read = batch.inputs["attention_mask"].bool()
    for attention in ("sdpa", "eager"):
        batch.model.get_decoder().set_attn_implementation(attention)
        with pruner(batch.model):
            found = batch.model(**batch.inputs).logits
        torch.testing.assert_close(found[is_read], expected[is_read], rtol=0, atol=1e-5)
    assert [[item.num_tokens for item in row] for row in pruner.statistics.items] == batch.items
    torch.testing.assert_close(batch.model(**batch.inputs).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_items_come_one_by_one(batch):
    pruner = Everything()
    with pruner(batch.model):
        batch.model(**batch.inputs)
    found = sorted(len(item.vectors) for item in pruner.seen)
    assert found == sorted(length for row in batch.items for length in row)
    assert all(item.grid is None or torch.tensor(item.grid).prod() == len(item.vectors) for item in pruner.seen)


def test_generated_with_everything_kept_is_generated_without_a_pruner(batch):
    # Before that version `generate` mixed up the pictures of a row when it repeated rows.
    for beams in (1, 2) if Version(transformers.__version__) >= Version("5.23") else (1,):
        expected = generated(batch, num_beams=beams)
        with Everything()(batch.model):
            assert torch.equal(generated(batch, num_beams=beams), expected)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 0.5])
def test_what_uniform_leaves_is_the_prompt_with_masked_keys(batch, tokens):
    pruner = Uniform(tokens=tokens)
    with pruner(batch.model):
        found = batch.model(**batch.inputs).logits
    is_kept = kept_columns(batch, pruner, layer=0)
    counts = [sum(pruner.budget(length) for length in row) for row in batch.items]
    assert (is_kept & batch.is_visual).sum(1).tolist() == counts
    mask = batch.inputs["attention_mask"] * is_kept
    inputs = {**batch.inputs, "attention_mask": mask, "position_ids": positions(batch)}
    expected = batch.model(**inputs).logits
    is_read = mask.bool()
    torch.testing.assert_close(found[is_read], expected[is_read], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_what_leaves_at_a_cut_is_no_key_from_there_on(batch, layer):
    pruner = EverySecond(layer=layer)
    with pruner(batch.model):
        found = batch.model(**batch.inputs).logits
    is_kept = kept_columns(batch, pruner, layer=layer)
    with dropped_as_keys(batch.model, ~is_kept, layer=layer):
        expected = batch.model(**batch.inputs).logits
    is_read = batch.inputs["attention_mask"].bool() & is_kept
    torch.testing.assert_close(found[is_read], expected[is_read], rtol=0, atol=1e-5)
    assert (~is_kept).any()


def test_generated_under_a_pruner_is_generated_with_masked_keys(batch):
    """Step by step, each a forward without a cache."""
    pruner = Uniform(tokens=2)
    with pruner(batch.model):
        found = generated(batch)
    is_kept = kept_columns(batch, pruner, layer=0)
    for row in range(len(found)):
        length = int(batch.inputs["attention_mask"][row].sum())
        assert found[row].tolist() == continued(batch, is_kept, row, length, len(found[row]))


def test_items_that_go_on_in_the_next_row_are_refused():
    marks = {"image": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)}
    assert [list(map(len, row)) for row in items_of_rows(marks, {"image": [1, 2, 3]})] == [[1, 2], [3]]
    for lengths in ([2, 2, 2], [3, 2]):
        with pytest.raises(RowError, match=r"rows with \[3, 3\] visual tokens"):
            items_of_rows(marks, {"image": lengths})


def test_every_stock_family_can_be_pruned_or_says_why_not():
    assert set(STOCK_READERS) == set(STOCK_PARTS) - set(UNSUPPORTED)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_audio"])
def test_what_cannot_be_pruned_says_why(family):
    reasons = {"gemma3": "in both directions, by a mask of pairs", "qwen2_audio": "it reads sounds"}
    with pytest.raises(OptionError, match=reasons[family]), Uniform(tokens=2)(tiny_stock_model(family)):
        pass


@pytest.mark.parametrize("family", ["llava", "internvl", "smolvlm", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_rows_without_pictures_are_left_alone(family):
    model = tiny_stock_model(family)
    inputs = tiny_stock_batch(model, media=False)
    del inputs["labels"]
    expected = model(**inputs).logits
    with Everything()(model):
        assert torch.equal(model(**inputs).logits, expected)


def generated(batch, **options):
    inputs = {name: value.clone() for name, value in left_padded(batch).items()}
    found = batch.model.generate(
        **inputs, max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=None, **options
    )
    return found[:, inputs["input_ids"].shape[1] :]


def left_padded(batch):
    """The batch with its padding in front, as `generate` wants it."""
    inputs = dict(batch.inputs)
    shifts = (batch.inputs["attention_mask"] == 0).sum(1).tolist()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.stack([row.roll(by) for row, by in zip(inputs[name], shifts, strict=True)])
    return inputs


def kept_columns(batch, pruner, *, layer):
    """Which columns of the batch (padded behind its rows) a pruner has left in front of a layer."""
    is_kept = torch.ones_like(batch.is_visual)
    for row, items in enumerate(pruner.statistics.items):
        columns = batch.is_visual[row].nonzero()[:, 0]
        for item in items:
            own, columns = columns[: item.num_tokens], columns[item.num_tokens :]
            is_kept[row, own] = False
            is_kept[row, own[item.kept[layer]]] = True
    return is_kept


@torch.no_grad()
def positions(batch):
    """Those that the model gives the tokens of the whole prompt."""
    seen = []
    hook = batch.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with contextlib.closing(_Removing(hook)):
        batch.model(**batch.inputs)
    ids = batch.inputs["input_ids"]
    return torch.arange(ids.shape[1]).expand_as(ids) if seen[0] is None else seen[0]


class _Removing:
    def __init__(self, handle):
        self.close = handle.remove


@contextlib.contextmanager
def dropped_as_keys(model, is_dropped, *, layer):
    """From a layer on nobody attends to these columns."""

    def hook(module, args, kwargs):
        lowest = torch.finfo(torch.float32).min
        return args, {
            **kwargs,
            "attention_mask": kwargs["attention_mask"].masked_fill(is_dropped[:, None, None], lowest),
        }

    layers = model.get_decoder().layers
    handles = [one.register_forward_pre_hook(hook, with_kwargs=True) for one in layers[layer:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def continued(batch, is_kept, row, length, num_tokens):
    """The likeliest words behind a row, one forward of the whole batch for each."""
    inputs = {**batch.inputs, "attention_mask": batch.inputs["attention_mask"] * is_kept}
    inputs["position_ids"] = positions(batch)
    inputs["input_ids"] = inputs["input_ids"].clone()
    words = []
    for place in range(length, length + num_tokens):
        logits = batch.model(**inputs).logits[row, place - 1]
        words.append(int(logits.argmax()))
        inputs = _with_word(inputs, row, place, words[-1])
    return words


def _with_word(inputs, row, place, word):
    width = inputs["input_ids"].shape[1]
    if place == width:
        fill = {"input_ids": 1, "attention_mask": 0, "position_ids": 0, "mm_token_type_ids": 0}
        inputs = {
            name: torch.nn.functional.pad(value, (0, 1), value=fill[name]) if name in fill else value
            for name, value in inputs.items()
        }
    for name, value in (("input_ids", word), ("attention_mask", 1)):
        inputs[name] = inputs[name].clone()
        inputs[name][row, place] = value
    inputs["position_ids"] = inputs["position_ids"].clone()
    inputs["position_ids"][..., row, place] = inputs["position_ids"][..., row, :place].max() + 1
    return inputs
