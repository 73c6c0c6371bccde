"""The encoder table: what is loaded out of which checkpoint, and which features come out."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from mllm.errors import CompositionError
from mllm.models.encoders import ENCODERS, encoder_family, load_encoder

SIDE = {"image_size": 16, "patch_size": 8}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
PREFIX = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 5,
    "vit": 1,
}


def _save(family, directory):
    torch.manual_seed(0)
    registers = {"num_register_tokens": 4} if PREFIX[family] == 5 else {}
    model = AutoModel.from_config(AutoConfig.for_model(family, **SMALL, **SIDE, **registers)).eval()
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", sorted(PREFIX))
@pytest.mark.parametrize("layer", [-1, -2, 2])
def test_features_are_those_of_the_whole_encoder(tmp_path, family, layer):
    whole = _save(family, tmp_path)
    encoder, num_prefix_tokens = load_encoder(str(tmp_path), feature_layer=layer)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(pixels, output_hidden_states=True).hidden_states[layer]
        found = encoder.eval()(pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(found, expected)
    assert num_prefix_tokens == PREFIX[family] == found.shape[1] - 4


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_image_half_of_a_two_tower_checkpoint(tmp_path, kind):
    config_class, model_class = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[kind]
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 8}
    torch.manual_seed(0)
    whole = model_class(config_class(text_config=text, vision_config={**SMALL, **SIDE})).eval()
    whole.save_pretrained(tmp_path)
    encoder, _ = load_encoder(str(tmp_path), feature_layer=-1)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
        found = encoder.eval()(pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(found, expected)
    assert not any("text" in name or name.startswith("head") for name, _ in encoder.named_parameters())


def test_the_table_names_exactly_the_parameters_without_gradient(tmp_path):
    for family in PREFIX:
        _save(family, tmp_path / family)
        encoder, _ = load_encoder(str(tmp_path / family), feature_layer=-1)
        encoder(torch.zeros(1, 3, 16, 16), output_hidden_states=True).hidden_states[-1].sum().backward()
        without_gradient = {name for name, value in encoder.named_parameters() if value.grad is None}
        named = {name for name, _ in encoder.named_parameters() if name.startswith(ENCODERS[family].unused)}
        assert without_gradient == named != set(), family


def test_naflex_encoder_is_refused():
    with pytest.raises(CompositionError, match="NaFlex"):
        encoder_family("siglip2", where="google/siglip2-base-patch16-naflex")


def test_unknown_family_lists_the_choices():
    with pytest.raises(CompositionError, match="clip, clip_vision_model, siglip"):
        encoder_family("bert", where="bert-base-uncased")


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_layer_that_is_not_there(tmp_path, layer):
    _save("vit", tmp_path)
    with pytest.raises(CompositionError, match="has 3 layers"):
        load_encoder(str(tmp_path), feature_layer=layer)


def test_checkpoint_with_a_missing_tensor(tmp_path):
    _save("clip_vision_model", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["pre_layrnorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompositionError, match="pre_layrnorm.weight"):
        load_encoder(str(tmp_path), feature_layer=-1)


@pytest.mark.parametrize("family", sorted(PREFIX))
def test_shortened_encoder_has_a_configuration_that_can_be_read_again(tmp_path, family):
    """A backbone's names its stages, one a layer; stale names are refused by transformers."""
    _save(family, tmp_path / "whole")
    encoder, _ = load_encoder(str(tmp_path / "whole"), feature_layer=-2)
    encoder.config.save_pretrained(tmp_path / "short")
    again = AutoConfig.from_pretrained(tmp_path / "short")
    assert type(again) is type(encoder.config)
    assert again.num_hidden_layers == 2
