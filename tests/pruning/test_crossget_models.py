"""CrossGET in models with a language model: what is left of a picture, where it stands, and what reads it."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

from mllm.errors import CheckpointError, OptionError
from mllm.pruning import CrossGet, build_pruner
from mllm.pruning.encoder_merging import UNSUPPORTED_STOCK
from mllm.testing import tiny_model
from mllm.testing_stock import tiny_stock_model

NUM_PATCHES = 16
ENCODERS = ("clip_vision_model", "siglip_vision_model", "dinov2", "vit")


def tiny_llava(*, num_layers: int = 4, image_size: int = 32, patch_size: int = 8) -> PreTrainedModel:
    """LLaVA-1.5, whose features are those in front of the encoder's last layer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llava",
        vision_config={
            **sizes, "model_type": "clip_vision_model", "num_hidden_layers": num_layers, "image_size": image_size,
            "patch_size": patch_size, "projection_dim": 32,
        },
        text_config={
            **sizes, "model_type": "llama", "vocab_size": 100, "num_hidden_layers": 2, "num_key_value_heads": 2,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 1000,
        },
        image_token_id=99,
        image_seq_length=(image_size // patch_size) ** 2,
    )  # fmt: skip
    torch.manual_seed(3)
    return AutoModelForMultimodalLM.from_config(config).eval()


def prompt(placeholder: int, num_vectors: int, *, side: int = 32, rows: int = 2, vocab_size: int = 90) -> dict:
    ids = torch.randint(3, vocab_size, (rows, num_vectors + 9))
    ids[:, 4 : 4 + num_vectors] = placeholder
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, side, side),
    }


def composed(directory: Path, connector, **parts) -> tuple[PreTrainedModel, dict]:
    """A model of ours of four patches and two layers of encoder, and a prompt about two pictures."""
    model, _ = tiny_model(directory, image={"connector": connector}, **parts)
    num_vectors = model.model.towers["image"].rule.connector.count(4)
    return model.eval(), prompt(model.config.image_token_id, num_vectors, side=16)


def recomputed(model: PreTrainedModel, inputs: dict, pruner: CrossGet) -> torch.Tensor:
    """Last logits of the whole prompt in which places that are left hold what is left, and others are masked."""
    with pruner(model), torch.no_grad():
        vectors = torch.stack(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    left = ~vectors[..., 0].isnan()
    is_visual = inputs["input_ids"] == model.config.image_token_id
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    embeds[is_visual] = vectors.nan_to_num(0.0).flatten(0, 1)
    mask = inputs["attention_mask"].clone()
    mask[is_visual] = left.flatten().long()
    positions = torch.arange(mask.shape[1]).expand(mask.shape)
    body = model.get_decoder()
    with torch.no_grad():
        hidden = body(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
        return model.lm_head(hidden[:, -1])


@pytest.mark.parametrize("cross_tokens", [None, "zeros"])
def test_llava_reads_what_is_left_at_the_places_of_its_patches(cross_tokens):
    model, inputs = tiny_llava(), prompt(99, NUM_PATCHES)
    pruner = CrossGet(tokens=7, cross_tokens=cross_tokens)
    expected = recomputed(model, inputs, pruner)
    with pruner(model), torch.no_grad():
        found = model(**inputs).logits[:, -1]
        assert pruner.counts(NUM_PATCHES, 2) == [7, 7]
        for (item,) in pruner.statistics.items:
            kept, into = item.kept[0].tolist(), item.merged_into[0].tolist()
            assert len(kept) == 7 and set(into) == set(kept) and all(into[place] == place for place in kept)
        features = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        vectors = torch.stack(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # The connector, row by row, of what the encoder has left; at the same places.
    assert torch.equal(features.isnan().all(dim=-1), vectors.isnan().all(dim=-1))
    left = ~vectors[..., 0].isnan()
    with torch.no_grad():
        torch.testing.assert_close(vectors[left], model.model.multi_modal_projector(features[left]))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("connector", ["mlp", "linear"])
def test_our_models_read_what_is_left(tmp_path, encoder, connector):
    model, inputs = composed(tmp_path, connector, encoder=encoder)
    num_vectors = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    pruner = CrossGet(tokens=num_vectors - 2)
    expected = recomputed(model, inputs, pruner)
    with pruner(model), torch.no_grad():
        found = model(**inputs).logits[:, -1]
        kept = {len(item.kept[0]) for row in pruner.statistics.items for item in row}
        assert kept == {num_vectors - 2} == set(pruner.counts(num_vectors, 2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("connector", ["qformer", "perceiver"])
def test_connectors_of_sequences_read_the_shorter_one(tmp_path, connector):
    options = {
        "type": connector,
        **(
            {"num_queries": 3, "layers": 2, "hidden_size": 32, "heads": 4}
            if connector == "qformer"
            else {"num_latents": 3, "depth": 1, "heads": 4, "head_size": 8}
        ),
    }
    model, inputs = composed(tmp_path, options)
    tower = model.model.towers["image"]
    pruner, read = CrossGet(tokens=2), []
    tower.connector.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with pruner(model), torch.no_grad():
        found = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        assert pruner.counts(3, 2) == [3, 3]
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    features = read[0]
    with torch.no_grad():
        for vectors, of_picture in zip(found, features, strict=True):
            left = of_picture[~of_picture[:, 0].isnan()]
            assert len(left) == 2
            torch.testing.assert_close(vectors, tower.connector.connect(left[None], None, None)[0])


def test_one_token_is_enough():
    model, inputs = tiny_llava(num_layers=3), prompt(99, NUM_PATCHES)
    with CrossGet(tokens=1)(model) as pruner, torch.no_grad():
        assert bool(model(**inputs).logits.isfinite().all())
        assert [len(item.kept[0]) for row in pruner.statistics.items for item in row] == [1, 1]


@pytest.mark.parametrize("cross_tokens", [None, "zeros"])
def test_thirteen_a_layer_leave_as_many_of_llava_as_the_paper_says(cross_tokens):
    # 24 layers of which 23 count, 576 patches; the published code gives the cross token to the language model, too.
    model = tiny_llava(num_layers=24, image_size=48, patch_size=2)
    pruner = CrossGet(r=13, cross_tokens=cross_tokens)
    expected = 278 if cross_tokens else 277
    with pruner(model), torch.no_grad():
        vectors = torch.stack(list(model.model.get_image_features(torch.randn(1, 3, 48, 48)).pooler_output))
        assert pruner.counts(576, 2) == [expected, expected]
    assert int((~vectors[..., 0].isnan()).sum()) == expected


def test_of_which_nothing_leaves_is_the_model_bit_for_bit(tmp_path):
    for model, inputs in ((tiny_llava(), prompt(99, NUM_PATCHES)), composed(tmp_path, "mlp")):
        with torch.no_grad():
            alone = model(**inputs).logits
            with CrossGet(tokens=10_000)(model):
                assert torch.equal(model(**inputs).logits, alone)


def test_no_trace_is_left_also_after_an_exception(tmp_path):
    for model, inputs in ((tiny_llava(), prompt(99, NUM_PATCHES)), composed(tmp_path, "mlp")):
        model(**inputs)
        modules = dict(model.named_modules())
        before = {
            name: (set(vars(one)), len(one._forward_hooks), len(one._forward_pre_hooks))
            for name, one in modules.items()
        }
        with torch.no_grad():
            alone = model(**inputs).logits
        with pytest.raises(RuntimeError, match="inside"), CrossGet(tokens=3)(model):
            model(**inputs)
            raise RuntimeError("inside")
        after = {
            name: (set(vars(one)), len(one._forward_hooks), len(one._forward_pre_hooks))
            for name, one in modules.items()
        }
        assert after == before
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, alone)


def test_rows_of_a_batch_generate_as_alone():
    model, inputs = tiny_llava(), prompt(99, NUM_PATCHES, rows=3)
    with CrossGet(tokens=5)(model):
        together = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for row in range(3):
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            assert torch.equal(model.generate(**one, max_new_tokens=4, do_sample=False)[0], together[row])


@pytest.mark.parametrize("options", [{}, {"cross_tokens": "zeros"}, {"positions": "compacted"}])
def test_frames_and_pictures_share_an_encoder_also_in_chunks(tmp_path, options):
    model, _ = tiny_model(tmp_path, image={"connector": "mlp"}, video={"connector": "mlp"})
    ids = torch.randint(3, 50, (1, 40))
    ids[0, 2:6], ids[0, 10:22] = model.config.image_token_id, model.config.video_token_id
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 16, 16),
        "pixel_values_videos": torch.randn(3, 3, 16, 16),
        "video_sizes": torch.tensor([3]),
    }
    pruner = CrossGet(tokens=2, **options)
    with pruner(model.eval()), torch.no_grad():
        whole = model(**inputs).logits
        assert (pruner.counts(4, 2), pruner.counts(12, 2)) == ([2, 2], [6, 6])
        for chunk in (None, 2):
            model.model.set_encoder_chunk(chunk)
            torch.testing.assert_close(model(**inputs).logits, whole)
            ((picture, video),) = pruner.statistics.items
            assert (len(picture.kept[0]), len(video.kept[0])) == (2, 6)
            frames = video.kept[0].view(3, 2) // 4
            assert frames.tolist() == [[0, 0], [1, 1], [2, 2]]
            assert set(video.merged_into[0].tolist()) == set(video.kept[0].tolist())


def test_a_pruner_counts_on_without_holding_its_model():
    model, pruner = tiny_llava(), CrossGet(r=2)
    with pruner(model):
        within = pruner.counts(NUM_PATCHES, 2)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None and pruner.counts(NUM_PATCHES, 2) == within == [10, 10]


def test_gradients_reach_the_connector_and_are_numbers():
    model, inputs = tiny_llava(), prompt(99, NUM_PATCHES)
    with CrossGet(tokens=5)(model):
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 99, -100)).loss.backward()
    for parameter in model.model.multi_modal_projector.parameters():
        assert bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())


@pytest.mark.parametrize("family", sorted(UNSUPPORTED_STOCK))
def test_models_that_need_all_patches_say_why(family):
    with pytest.raises(OptionError, match="merges tokens inside of encoders: "), CrossGet()(tiny_stock_model(family)):
        pass


def test_connectors_and_encoders_that_need_all_patches_say_why(tmp_path):
    model, _ = composed(tmp_path / "merge", "patch_merge")
    with pytest.raises(OptionError, match="joins neighbouring patches"), CrossGet()(model):
        pass
    model, _ = composed(tmp_path / "dino", "mlp", encoder="dinov3_vit")
    with pytest.raises(OptionError, match="rotates by the places"), CrossGet()(model):
        pass


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(OptionError, match="r = 0"):
        CrossGet(r=0)
    with pytest.raises(OptionError, match="importance = 'loud'"):
        CrossGet(importance="loud")
    with pytest.raises(OptionError, match="no encoder yet"):
        CrossGet(r=3).counts(576, 32)
    model, inputs = tiny_llava(), prompt(99, NUM_PATCHES)
    with (
        pytest.raises(OptionError, match="of which 1 are no patches"),
        CrossGet(tokens=1, cross_tokens="zeros")(model),
    ):
        model(**inputs)
    untuned = CrossGet(tokens=5, cross_tokens=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cross_tokens.safetensors is not there"), untuned(model):
        pass
    assert build_pruner("crossget r=13 cross_tokens=zeros importance=cosine") == CrossGet(
        r=13, cross_tokens="zeros", importance="cosine"
    )
