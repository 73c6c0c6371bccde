"""A pruner on a model: what it refuses, and the ways in which a model is used under it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from mllm.errors import OptionError, RowError
from mllm.inference import Chat
from mllm.models.shared_images import images_at
from mllm.pruning import Cut, FastV, Pruner, Random, Row, Selection, Uniform, VisionDrop, VisionZip
from mllm.testing import tiny_model
from mllm.testing_pruning import (
    NUM_TOKENS,
    KeepsFirst,
    Shuffles,
    columns_of_items,
    enlarge,
    recomputed,
    tiny_prunable_model,
    watched,
)
from mllm.testing_stock import tiny_stock_batch, tiny_stock_model


@dataclass
class LastHalf(Pruner):
    """At each of its cuts keeps the last half of what is there."""

    layers: tuple[int, ...] = (1,)

    def cuts(self, num_layers: int) -> tuple[Cut, ...]:
        return tuple(Cut(layer, layer) for layer in self.layers)

    def select_at_cut(self, row: Row, cut: int, entered: tuple[int, ...], num_layers: int) -> list[Selection]:
        return [Selection(torch.arange(len(item) // 2, len(item))) for item in row.items]


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    return tiny_prunable_model(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"tokens": -1}, {"tokens": 0.0}, {"tokens": 1.0}, {"positions": "?"}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match=f"Uniform: {next(iter(options))} = "):
        Uniform(**options)


@pytest.mark.parametrize(
    "pruner", [FastV(layer=4), LastHalf(layers=(1, 7)), LastHalf(layers=(2, 1)), LastHalf(layers=(-1,))]
)
def test_layers_that_the_model_lacks_are_refused(composed, pruner):
    with pytest.raises(OptionError, match="layers"):
        pruner(composed[0]).__enter__()
    assert "_mllm_pruner" not in vars(composed[0])


def test_one_pruner_at_a_time(composed):
    model = composed[0]
    with Uniform()(model):
        with pytest.raises(OptionError, match="a Random for a model that a Uniform is attached to"):
            Random()(model).__enter__()
        assert "_mllm_pruner" in vars(model)
    with Random()(model):
        pass


def test_a_model_without_pictures_is_refused():
    with pytest.raises(OptionError, match="reads sounds"):
        Uniform()(tiny_stock_model("qwen2_audio")).__enter__()


def test_bad_inputs_say_what_is_wrong(composed):
    model = composed[0]
    inputs = _inputs(model)
    pairs = torch.ones(1, 1, *[inputs["input_ids"].shape[1]] * 2, dtype=torch.bool)
    positions = torch.arange(inputs["input_ids"].shape[1])[None] % 12
    with Uniform(tokens=3)(model), torch.no_grad():
        for options, match in (
            ({"attention_mask": pairs}, "mask of pairs"),
            ({"attention_mask": None, "position_ids": positions}, "begin anew"),
            ({"output_attentions": True}, "output_attentions"),
        ):
            with pytest.raises(OptionError, match=match):
                model(**{**inputs, **options})
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        vectors = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds[inputs["input_ids"] == model.config.image_token_id] = torch.cat(list(vectors))
        with pytest.raises(RowError, match="no `input_ids`"):
            model(inputs_embeds=embeds)
        assert model(inputs_embeds=embeds.nan_to_num()).logits.isfinite().all()
        with pytest.raises(OptionError, match="StaticLayer"):
            _answer(model, inputs, cache_implementation="static")


def test_a_prefill_in_chunks_is_for_pruners_that_do_not_cut(composed):
    model = composed[0]
    inputs = _inputs(model)
    with Uniform(tokens=5)(model):
        assert torch.equal(_answer(model, inputs, prefill_chunk_size=8), _answer(model, inputs))
    with VisionDrop(tokens=5)(model), pytest.raises(OptionError, match="chunks"):
        _answer(model, inputs, prefill_chunk_size=8)


def test_a_cache_belongs_to_its_pruner(composed):
    model = composed[0]
    inputs = _inputs(model)
    following = {
        "input_ids": torch.tensor([[40, 41]]),
        "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 2),
    }
    cache = DynamicCache()
    with VisionDrop(tokens=6)(model):
        _answer(model, inputs, past_key_values=cache, max_new_tokens=1)
    with pytest.raises(OptionError, match="without it"):
        _answer(model, following, past_key_values=cache)
    with Uniform()(model), pytest.raises(OptionError, match="a cache filled by a pruner that cuts at layers"):
        _answer(model, following, past_key_values=cache)
    with VisionDrop(tokens=6, positions="compacted")(model), pytest.raises(OptionError, match="positions original"):
        _answer(model, following, past_key_values=cache)
    with VisionDrop(tokens=6)(model):
        assert _answer(model, following, past_key_values=cache).shape == (1, 5)
    with pytest.raises(RowError, match="cropped by 12 tokens"):
        cache.crop(-12)
    cache.reset()
    assert type(cache) is DynamicCache and _answer(model, inputs, past_key_values=cache).shape[0] == 1


def test_hidden_states_stand_at_their_columns(composed):
    model = composed[0]
    inputs = _inputs(model)
    with torch.no_grad(), LastHalf(layers=(0, 2))(model):
        found = model(**inputs, output_hidden_states=True, use_cache=False)
    columns = _columns(model, inputs)
    with watched(model, LastHalf(layers=(0, 2)), columns) as seen, torch.no_grad():
        model(**inputs, use_cache=False)
    expected, hooks = [], []
    for layer in model.get_decoder().layers:
        hooks.append(layer.register_forward_hook(lambda _, args, output: expected.append(output)))
    recomputed(model, seen)
    for hook in hooks:
        hook.remove()
    assert len(found.hidden_states) == 5
    for number, hidden in enumerate(found.hidden_states[1:-1]):
        num_gone = 8 if number < 2 else 12
        left = [column for column in range(hidden.shape[1]) if not 3 <= column < 3 + num_gone]
        torch.testing.assert_close(hidden[0, left], expected[number][0, left], rtol=1e-5, atol=1e-5)
        assert torch.equal(hidden[0, 3 : 3 + num_gone], hidden[0, [2] * num_gone])


def test_a_model_with_adapters_is_pruned_as_the_merged_one(tmp_path):
    model, _ = tiny_prunable_model(tmp_path)
    inputs = _inputs(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with VisionDrop(tokens=5)(adapted) as pruner:
        with pytest.raises(OptionError, match="attached"):
            Uniform()(model).__enter__()
        found = _answer(adapted, inputs)
        assert pruner.statistics.num_prompts == 1
    merged = adapted.merge_and_unload()
    with VisionDrop(tokens=5)(merged):
        assert torch.equal(_answer(merged, inputs), found)


def test_a_chat_streams_what_generate_gives(tmp_path):
    model, processor = tiny_model(tmp_path)
    enlarge(model)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Is there a 5?"}]
    pruner, messages = Uniform(tokens=2), [{"role": "user", "content": content}]
    plain = Chat(model, processor, max_new_tokens=8).reply(messages)
    pieces = list(Chat(model, processor, max_new_tokens=8, pruner=pruner).stream(messages))
    assert pruner.statistics.items[0][0].kept[0].shape == (2,)
    with pruner(model):
        assert Chat(model, processor, max_new_tokens=8).reply(messages) == "".join(pieces) != plain


def test_tokens_guessed_ahead_are_taken_back(composed):
    """Looked up in the prompt, and mostly wrong: `generate` crops the cache."""
    model = composed[0]
    inputs = _inputs(model, words=[30, 31, 32, 30, 31])
    for positions in ("original", "compacted"):
        with VisionDrop(tokens=5, positions=positions)(model):
            expected = _answer(model, inputs, max_new_tokens=12)
            assert torch.equal(_answer(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3), expected)


def test_a_prompt_may_end_with_a_picture(composed):
    """Its answer follows from the last token that is left."""
    model = composed[0]
    inputs = _inputs(model, words=[])
    with torch.no_grad(), watched(model, KeepsFirst(tokens=3), _columns(model, inputs)) as seen:
        found = model(**inputs, use_cache=False).logits[0, -1]
    torch.testing.assert_close(found, recomputed(model, seen)[0, 5], rtol=0, atol=1e-5)


def test_a_stock_model_may_show_a_picture_at_several_places():
    """As sides of a pair do; and what stood on the model before is there again in between."""
    model = tiny_stock_model("llava")
    enlarge(model)
    inputs = tiny_stock_batch(model)
    pixels, places = inputs.pop("pixel_values"), torch.tensor([1, 0, 0, 1])
    inputs = {name: inputs[name][[0, 1, 0, 1]] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), KeepsFirst(tokens=2)(model) as pruner:
        expected = model(**inputs, pixel_values=pixels[places]).logits
        with images_at(model.model, places=places, grids=None, connected=None):
            found = model(**inputs, pixel_values=pixels).logits
        assert [len(item.kept[0]) for row in pruner.statistics.items for item in row] == [2] * 4
        assert torch.equal(model(**inputs, pixel_values=pixels[places]).logits, expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1, 2), (2,)])
def test_deep_features_reach_what_is_left_of_them(layers):
    """Qwen3-VL adds some behind each of its first two layers."""
    model = tiny_stock_model("qwen3_vl")
    enlarge(model)
    inputs = tiny_stock_batch(model)
    del inputs["labels"]
    columns = columns_of_items(inputs["input_ids"], model.config.image_token_id, [4, 4])
    with torch.no_grad(), watched(model, LastHalf(layers=layers), columns) as seen:
        found = model(**inputs, use_cache=False).logits
    expected = recomputed(model, seen)
    left = [0, 1, 2, 3, *range(8, 14)]
    torch.testing.assert_close(found[:, left], expected[:, left], rtol=1e-5, atol=1e-5)


def test_a_kernel_that_takes_gaps_for_packing_sees_none(composed):
    """Flash attention does, also in the middle of a conversation; here another kernel by such a name looks out."""
    model = composed[0]
    seen = []

    def looks_out(module, query, key, value, attention_mask, position_ids=None, **kwargs):
        assert position_ids is None or query.shape[2] == 1 or (position_ids.diff() == 1).all()
        seen.append(position_ids is None)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    inputs = _inputs(model)
    with VisionDrop(tokens=6)(model):
        expected = _answer(model, inputs)
    AttentionInterface.register("flash_lookout", looks_out)
    AttentionMaskInterface.register("flash_lookout", sdpa_mask)
    text = model.config.get_text_config()
    text._attn_implementation = "flash_lookout"
    try:
        for pruner in (Uniform(tokens=6), VisionDrop(tokens=6)):
            with pruner(model):
                found = _answer(model, inputs)
    finally:
        text._attn_implementation = "sdpa"
    assert torch.equal(found, expected) and seen and not any(seen)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "flash_attention_2"])
def test_kernels_of_a_gpu_answer_as_eager_attention(tmp_path, backend):
    """Also in the second turn on a cache, where flash attention could take gaps between positions for packing."""
    if backend == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    model = tiny_prunable_model(tmp_path)[0].to("cuda", torch.bfloat16)
    inputs = {name: one.to("cuda") for name, one in _inputs(model).items()}
    for pruner in (KeepsFirst(tokens=5), Shuffles(), Shuffles(positions="compacted")):
        found = []
        for kernel in ("eager", backend):
            model.set_attn_implementation(kernel)
            cache = DynamicCache()
            with pruner(model), torch.no_grad():
                found += [model(**inputs, past_key_values=cache).logits[:, -5:] for _ in range(2)]
        for one, other in zip(found[:2], found[2:], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0.2)


def test_half_precision_stays_near(tmp_path):
    model, _ = tiny_prunable_model(tmp_path)
    inputs = _inputs(model)
    with torch.no_grad(), Uniform(tokens=6)(model):
        expected = model(**inputs).logits
    model.to(torch.bfloat16)
    for pruner in (Uniform(tokens=6), VisionZip(tokens=6), VisionDrop(tokens=6), FastV(tokens=12)):
        with torch.no_grad(), pruner(model):
            found = model(**inputs).logits
        assert found.dtype == torch.bfloat16 and found.isfinite().all()
        if isinstance(pruner, Uniform):
            torch.testing.assert_close(found[0, -5:].float(), expected[0, -5:], rtol=0, atol=0.2)


def _inputs(model, words: list[int] | None = None) -> dict[str, torch.Tensor]:
    """A picture behind three words, and in front of five."""
    row = [
        20,
        21,
        22,
        *[model.config.image_token_id] * NUM_TOKENS,
        *([23, 24, 25, 26, 27] if words is None else words),
    ]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row)).long(), "pixel_values": pixels}


def _columns(model, inputs) -> list[list[torch.Tensor]]:
    return columns_of_items(inputs["input_ids"], model.config.image_token_id, [NUM_TOKENS])


def _answer(model, inputs: dict, **options) -> torch.Tensor:
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**inputs, **{**settings, **options})
