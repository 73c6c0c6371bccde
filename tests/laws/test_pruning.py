"""Pruners: what they keep is what the model answers from, exactly; and they leave nothing behind.

A model under a pruner == the whole prompt, recomputed layer by layer, with what left masked as keys
(`mllm.testing_pruning`). All methods stand in these laws as soon as they are in the table of `mllm.pruning`; most of
the product of methods, positions, backends and families is slow.
"""

import copy
import itertools
from collections.abc import Collection

import pytest
import torch
from transformers import DynamicCache

from mllm.errors import OptionError
from mllm.pruning import PRUNERS, Pruner
from mllm.pruning.anatomy import UNSUPPORTED
from mllm.testing_pruning import (
    NUM_TOKENS,
    KeepsAll,
    Shuffles,
    answered,
    columns_of_items,
    enlarge,
    pictures_and_words,
    recomputed,
    tiny_pictures,
    tiny_prunable_model,
    watched,
)
from mllm.testing_stock import STOCK_FAMILIES, tiny_stock_batch, tiny_stock_model

KEPT = 9
NAMES = sorted(PRUNERS)
VISUAL_ONLY = [name for name in NAMES if not PRUNERS[name].reads_text]
POSITIONS = ("original", "compacted")
STOCK = [name for name in STOCK_FAMILIES if name not in UNSUPPORTED]
FAST = ("shuffles", "visiondrop")  # where not all methods are


def slow_but(cases: Collection, fast: Collection = FAST) -> list:
    """Parameters that are slow, except a few."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    return tiny_prunable_model(tmp_path_factory.mktemp("parts"))


def made(name: str, **options) -> Pruner:
    return Shuffles(**options) if name == "shuffles" else PRUNERS[name](tokens=KEPT, **options)


# --- everything kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_everything_kept_through_the_gather_path_equals_no_pruner(composed, positions, backend):
    model = _with_backend(composed[0], backend)
    inputs = pictures_and_words(model)
    expected = answered(model, inputs)
    pruner = KeepsAll(positions=positions)
    with pruner(model):
        found = answered(model, inputs)
    _with_backend(model, "sdpa")
    _assert_same_answers(found, expected)
    assert pruner.statistics.items[1][1].kept[3].tolist() == list(range(NUM_TOKENS))


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_all_tokens_equals_no_pruner(composed, name):
    model = composed[0]
    inputs = pictures_and_words(model)
    expected = answered(model, inputs)
    for tokens in (NUM_TOKENS, 10_000):
        with PRUNERS[name](tokens=tokens)(model):
            _assert_same_answers(answered(model, inputs), expected)


def test_padding_on_the_right_is_as_on_the_left(composed):
    model = composed[0]
    inputs = pictures_and_words(model)
    right = _on_the_right(inputs)
    for positions in POSITIONS:
        with Shuffles(positions=positions)(model), torch.no_grad():
            found, expected = model(**right).logits, model(**inputs).logits
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            length = int(mask.sum())
            torch.testing.assert_close(found[row, :length], expected[row, -length:], rtol=0, atol=1e-5)


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shuffles", *NAMES])
def test_generation_equals_the_reference(composed, name):
    _assert_generation_is_right(composed[0], made(name), pictures_and_words(composed[0]))


@pytest.mark.parametrize("name", slow_but(["shuffles", *NAMES]))
def test_generation_from_compacted_positions_equals_the_reference(composed, name):
    _assert_generation_is_right(composed[0], made(name, positions="compacted"), pictures_and_words(composed[0]))


def _assert_generation_is_right(model, pruner: Pruner, inputs: dict, *, tolerance: float = 1e-5) -> None:
    columns = _columns(model, inputs)
    with watched(model, pruner, columns) as seen:
        found = answered(model, inputs)
    answers = found.sequences[:, inputs["input_ids"].shape[1] :]
    logits = recomputed(model, seen, answers)[:, -answers.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), logits, rtol=0, atol=tolerance)
    logits[..., model.generation_config.suppress_tokens] = float("-inf")
    assert torch.equal(logits.argmax(-1), answers)


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", slow_but([KEPT, 12, 0.75], [KEPT]))
@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_each_layer_are_as_counted(composed, name, tokens):
    model = composed[0]
    inputs, cache = pictures_and_words(model), DynamicCache()
    pruner = PRUNERS[name](tokens=tokens)
    with pruner(model):
        answered(model, inputs, past_key_values=cache, max_new_tokens=1)
    counts = pruner.counts(NUM_TOKENS, 4)
    num_items = [len(row) for row in _columns(model, inputs)]
    num_words = (inputs["attention_mask"].sum(1) - NUM_TOKENS * torch.tensor(num_items)).tolist()
    expected = [[words + items * count for words, items in zip(num_words, num_items, strict=True)] for count in counts]
    assert pruner.statistics.tokens_per_layer == expected
    assert [layer.get_seq_length() for layer in cache.layers] == [max(row) for row in expected]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    for item in pruner.statistics.items[1]:
        starts = [max(stage for stage in item.kept if stage <= layer) for layer in range(4)]
        assert [len(item.kept[start]) for start in starts] == counts


# --- caches, batches, turns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", slow_but(POSITIONS, ["original"]))
@pytest.mark.parametrize("name", slow_but(["shuffles", *VISUAL_ONLY]))
def test_cached_equals_uncached(composed, name, positions):
    model = composed[0]
    inputs = pictures_and_words(model)
    pruner = made(name, positions=positions)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        with pruner(model):
            cached = answered(model, inputs, **options)
        with pruner(model):
            uncached = answered(model, inputs, use_cache=False, **options)
        _assert_same_answers(cached, uncached)


@pytest.mark.parametrize("name", slow_but(["shuffles", *(name for name in NAMES if name != "random")]))
def test_several_answers_to_a_prompt_are_the_answers_to_several_prompts(composed, name):
    """Sampled with one seed. Not for random: there each picture has its own chance."""
    model = composed[0]
    inputs = pictures_and_words(model)
    pruner = made(name)
    options = {"do_sample": True, "temperature": 1.0}
    repeated = {key: value.repeat_interleave(2, dim=0) for key, value in inputs.items() if key != "pixel_values"}
    repeated["pixel_values"] = inputs["pixel_values"][[0, 0, 1, 2, 1, 2]]
    with pruner(model):
        torch.manual_seed(3)
        found = answered(model, inputs, num_return_sequences=2, **options)
        torch.manual_seed(3)
        expected = answered(model, repeated, **options)
    _assert_same_answers(found, expected)


@pytest.mark.parametrize("name", slow_but(["shuffles", *NAMES]))
def test_alone_equals_together(composed, name):
    model = composed[0]
    inputs = pictures_and_words(model)
    pruner = made(name)
    with pruner(model):
        together = answered(model, inputs)
    images = iter(inputs["pixel_values"])
    with pruner(model):
        for row, columns in enumerate(_columns(model, inputs)):
            own = inputs["attention_mask"][row].bool()
            alone = {"input_ids": inputs["input_ids"][row][own][None], "attention_mask": own[own][None].long()}
            if columns:
                alone["pixel_values"] = torch.stack([next(images) for _ in columns])
            found = answered(model, alone)
            logits = torch.stack(together.logits)[:, row]
            torch.testing.assert_close(torch.stack(found.logits)[:, 0], logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", slow_but(["shuffles", *VISUAL_ONLY], ["shuffles"]))
@pytest.mark.parametrize("first", ["a picture", "text"])
def test_turns_on_one_cache_equal_one_prompt(composed, name, positions, first):
    """The second turn has a picture, too; the third none. Copies of the cache, cropped ones, too, answer alike."""
    model = composed[0]
    pruner = made(name, positions=positions)
    picture = [model.config.image_token_id] * NUM_TOKENS
    turns = [[5, 6, *(picture if first == "a picture" else [5]), 7, 8, 9], [10, *picture, 11, 12], [13, 14]]
    images = tiny_pictures(2 if first == "a picture" else 1)
    ids = [torch.tensor([sum(turns[: count + 1], [])]) for count in range(3)]
    with pruner(model):
        expected = answered(model, {"input_ids": ids[2], "pixel_values": images}, max_new_tokens=3)
    cache, num_before = DynamicCache(), len(images) - 1
    with pruner(model):
        answered(model, _turn(ids[0], 0, images[:num_before]), past_key_values=cache, max_new_tokens=1)
        answered(model, _turn(ids[1], len(turns[0]), images[num_before:]), past_key_values=cache, max_new_tokens=1)
        kept, num_seen = copy.deepcopy(cache), ids[1].shape[1]
        assert cache.get_seq_length() == num_seen
        found = answered(model, _turn(ids[2], num_seen), past_key_values=cache, max_new_tokens=3)
    _assert_continued(found, expected)
    with pruner(model):
        found = answered(model, _turn(ids[2], num_seen), past_key_values=kept, max_new_tokens=3)
        _assert_continued(found, expected)
        cache.crop(-3)  # two tokens that were said, and one of the question
        found = answered(model, _turn(ids[2], cache.get_seq_length()), past_key_values=cache, max_new_tokens=3)
    _assert_continued(found, expected)


@pytest.mark.parametrize("name", VISUAL_ONLY)
def test_text_behind_a_picture_does_not_change_what_is_kept_of_it(composed, name):
    model = composed[0]
    inputs, kept = pictures_and_words(model), []
    changed = inputs["input_ids"].clone()
    changed[:, -3:] = torch.tensor([90, 91, 92])
    for ids in (inputs["input_ids"], changed):
        with made(name)(model) as pruner, torch.no_grad():
            model(**{**inputs, "input_ids": ids})
        kept.append([[item.kept for item in row] for row in pruner.statistics.items])
    assert str(kept[0]) == str(kept[1])


# --- the full product ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("llm", ["llama", "qwen2", "qwen3", "phi3", "olmo2", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("encoder", ["clip_vision_model", "siglip_vision_model", "dinov2"])
def test_all_methods_in_all_models(tmp_path, encoder, llm, backend):
    """A method that a model lacks something for, or whose options do not suit it, says so."""
    model = _with_backend(tiny_prunable_model(tmp_path, encoder=encoder, llm=llm)[0], backend)
    inputs, refused = pictures_and_words(model), set()
    for name in ("shuffles", *NAMES):
        for positions in POSITIONS:
            try:
                _assert_generation_is_right(model, made(name, positions=positions), inputs, tolerance=2e-5)
            except OptionError as error:
                refused.add((name, positions, error.found))
    for name, positions, found in refused:
        is_blind = "class token" in found and encoder == "siglip_vision_model"
        assert is_blind or ("rotary" in found and llm == "gpt2"), (name, positions, found)


@pytest.mark.slow
@pytest.mark.parametrize("family", STOCK)
def test_all_methods_in_stock_models(family):
    """Of two layers and few tokens; what goes by vectors alone, or by attention between them, goes anywhere."""
    model = tiny_stock_model(family)
    enlarge(model)
    inputs = tiny_stock_batch(model)
    del inputs["labels"]
    is_word = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)
    done = set()
    for name, positions in itertools.product(NAMES, POSITIONS):
        pruner = PRUNERS[name](tokens=3, positions=positions)
        try:
            with watched(model, pruner, []) as seen, torch.no_grad():
                found = model(**inputs, use_cache=False).logits
        except OptionError:
            continue
        lengths = [item.num_tokens for row in pruner.statistics.items for item in row]
        seen.columns = columns_of_items(inputs["input_ids"], model.config.image_token_id, lengths)
        torch.testing.assert_close(found[is_word], recomputed(model, seen)[is_word], rtol=1e-5, atol=1e-5)
        done.add((name, positions))
    assert {(name, "original") for name in ("divprune", "random", "tome", "uniform", "visiondrop")} <= done


def _on_the_right(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    order = torch.sort(inputs["attention_mask"], dim=1, descending=True, stable=True).indices
    return {**inputs, **{key: inputs[key].gather(1, order) for key in ("input_ids", "attention_mask")}}


def _turn(ids: torch.Tensor, num_seen: int, images: torch.Tensor | tuple = ()) -> dict[str, torch.Tensor]:
    """What is new of a prompt, of which a cache has seen the first tokens."""
    media = {"pixel_values": images} if len(images) else {}
    return {"input_ids": ids[:, num_seen:], "attention_mask": torch.ones_like(ids)} | media


def _columns(model, inputs) -> list[list[torch.Tensor]]:
    num_images = len(inputs.get("pixel_values", ()))
    return columns_of_items(inputs["input_ids"], model.config.image_token_id, [NUM_TOKENS] * num_images)


def _assert_same_answers(found, expected) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)


def _assert_continued(found, expected) -> None:
    num_answered = len(expected.logits)
    assert torch.equal(found.sequences[:, -num_answered:], expected.sequences[:, -num_answered:])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-5)


def _with_backend(model, backend: str):
    model.set_attn_implementation(backend)
    return model
