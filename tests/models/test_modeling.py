"""The composed model as transformers sees it."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mllm.errors import OptionError, RowError
from mllm.models import MllmConfig, MllmForConditionalGeneration, MllmTowerConfig
from mllm.models.connectors import written_connector
from mllm.sizes import ImageTokenRule, written_rule
from mllm.testing import tiny_encoder, tiny_llm

IMAGE = 299


def build(*, encoder="clip_vision_model", llm="llama", tied=False, connector="mlp"):
    encoder_config = tiny_encoder(encoder).config
    num_prefix = {"siglip_vision_model": 0}.get(encoder, 1)
    rule = ImageTokenRule(16, 8, num_prefix, feature_select="default" if num_prefix else "full")
    config = MllmConfig(
        text_config=tiny_llm(llm, vocab_size=300, tied=tied).config,
        image_config=MllmTowerConfig(
            encoder_config=encoder_config,
            connector=written_connector(connector),
            feature_sizes=[32],
            text_hidden_size=32,
            rule=written_rule(rule),
            placeholder_token_id=IMAGE,
        ),
    )
    torch.manual_seed(2)
    return MllmForConditionalGeneration(config).eval()


@pytest.fixture
def batch():
    """Two rows: one image, and two images of four features each."""
    torch.manual_seed(3)
    ids = torch.randint(0, 290, (2, 14))
    ids[0, 1:5] = IMAGE
    ids[1, 2:6] = IMAGE
    ids[1, 8:12] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(3, 3, 16, 16), "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def test_every_row_sees_its_own_images(batch):
    model = build()
    alone = model(
        input_ids=batch["input_ids"][1:], pixel_values=batch["pixel_values"][1:], attention_mask=torch.ones(1, 14)
    ).logits
    torch.testing.assert_close(model(**batch).logits[1:], alone, rtol=1e-5, atol=1e-6)
    swapped = batch["pixel_values"][[0, 2, 1]]
    changed = model(**{**batch, "pixel_values": swapped}).logits
    assert torch.equal(changed[0], model(**batch).logits[0]) and not torch.allclose(changed[1:], alone)


@pytest.mark.parametrize("connector", ["mlp", "linear"])
@pytest.mark.parametrize("encoder", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_saved_equals_reloaded(tmp_path, batch, encoder, connector, tied):
    model = build(encoder=encoder, connector=connector, tied=tied)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is MllmForConditionalGeneration
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("llm", ["gpt2", "opt", "falcon", "gpt_neox", "gemma3_text"])
def test_tied_heads_by_any_name_of_the_embedding(tmp_path, llm):
    model = build(llm=llm, tied=True)
    model.save_pretrained(tmp_path)
    again = MllmForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_attention_choice_and_unsplittable_modules_reach_every_part():
    model = build()
    model.set_attn_implementation("eager")
    tower = model.model.image_tower
    assert (
        tower.encoder.config._attn_implementation == model.model.language_model.config._attn_implementation == "eager"
    )
    assert {"CLIPEncoderLayer", "LlamaDecoderLayer"} <= set(model._no_split_modules)


def test_frozen_encoder_stays_in_eval_mode_and_leaves_no_graph(batch):
    model = build()
    tower = model.model.image_tower
    model.train()
    assert tower.encoder.training
    tower.encoder.requires_grad_(False)
    model.train()
    assert not tower.encoder.training and tower.connector.training and model.model.language_model.training
    assert not tower.encode(batch["pixel_values"]).requires_grad and tower(batch["pixel_values"]).requires_grad


def test_trained_encoder_gets_gradients(batch):
    model = build().train()
    model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)).loss.backward()
    assert model.model.image_tower.encoder.embeddings.patch_embedding.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_labels_give_the_loss_of_the_logits(batch):
    model = build()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    logits = model(**batch).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None


@pytest.mark.parametrize("num_images", [0, 2, 4])
def test_images_and_placeholders_that_disagree(batch, num_images):
    pixels = torch.randn(num_images, 3, 16, 16)
    with pytest.raises(RowError, match="12 placeholder tokens"):
        build()(**{**batch, "pixel_values": pixels})


def test_beams_see_the_images(batch):
    model = build()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    one = model.generate(**{k: v[1:] for k, v in batch.items()}, num_beams=3, **settings)
    both = model.generate(**batch, num_beams=3, **settings)
    assert torch.equal(both[1:], one)


def test_unknown_connector_lists_the_choices():
    with pytest.raises(OptionError, match="linear, mlp"):
        build(connector="perceptron")
