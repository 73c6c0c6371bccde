"""Images to vectors: one alone is as in a batch, the same image is the same vector, and the encoder really looks."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, CLIPImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm

from mllm import load_model, load_processor
from mllm.errors import OptionError
from mllm.preference_data.embedders import EMBEDDERS, ClipEmbedder, ModelEmbedder
from mllm.processing.images import decode_image
from mllm.testing import tiny_model
from mllm.testing_checkpoints import save_stock_checkpoint
from mllm.testing_stock import STOCK_FAMILIES

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = VISION | {"vocab_size": 50, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
SQUARE = {"image_size": 16, "patch_size": 8}
TILES = {"squares": {}, "tiles": {"tiles": "llava_next"}, "other tiles": {"tiles": "sphinx"}}


@pytest.fixture(autouse=True)
def _num2words(monkeypatch):
    """SmolVLM's processor wants a package for its default prompts about videos."""
    monkeypatch.setattr(processing_smolvlm, "num2words", processing_smolvlm.num2words or str)


def images():
    rng = np.random.default_rng(0)
    sizes = ((20, 20), (14, 30), (33, 16), (20, 20))
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def check(embedder):
    pictures = images()
    together = embedder.embed(pictures)
    alone = torch.cat([embedder.embed([picture]) for picture in pictures])
    assert together.shape == alone.shape and together.dtype == torch.float32
    assert torch.allclose(together, alone, atol=1e-5)
    first, second = embedder.embed([pictures[0], pictures[0].copy()])
    assert torch.allclose(first, second, atol=1e-6)
    distances = torch.cdist(together, together) + 9 * torch.eye(len(pictures))
    assert distances.min() > 1e-4
    return together


@pytest.mark.parametrize("image", TILES.values(), ids=TILES)
def test_own_encoder_of_a_composed_model(tmp_path, image):
    model, processor = tiny_model(tmp_path, image=image)
    together = check(ModelEmbedder(model.eval(), processor))
    if not image:  # the mean of the features that the connector gets
        tower, seen = model.model.image_tower, []
        handle = tower.connector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            model.get_image_features(processor.image_processor(images(), return_tensors="pt")["pixel_values"])
        handle.remove()
        assert torch.allclose(together, seen[0].mean(1), atol=1e-5)


@pytest.mark.parametrize("family", [family for family in STOCK_FAMILIES if family != "qwen2_audio"])
def test_own_encoder_of_a_stock_model(tmp_path, family):
    path = save_stock_checkpoint(tmp_path / family, family)
    check(ModelEmbedder(load_model(path).eval(), load_processor(path)))


def test_a_model_without_images_compares_none(tmp_path):
    path = save_stock_checkpoint(tmp_path / "ears", "qwen2_audio")
    with pytest.raises(OptionError, match="reads no images"):
        ModelEmbedder(load_model(path), load_processor(path))


def save_encoder(folder, family):
    vision = VISION | SQUARE
    if family in ("clip", "siglip"):
        projection = {"projection_dim": 24} if family == "clip" else {}
        config = AutoConfig.for_model(family, vision_config=vision, text_config=TEXT, **projection)
    else:
        config = AutoConfig.for_model(family, **vision)
    AutoModel.from_config(config).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessorPil(**sides).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", EMBEDDERS)
def test_encoder_like_clip(tmp_path, family):
    folder = save_encoder(tmp_path / family, family)
    together = check(ClipEmbedder.from_pretrained(folder))
    model = AutoModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        [decode_image(one) for one in images()], return_tensors="pt"
    )
    with torch.no_grad():
        if family == "clip":
            pooled = model.visual_projection(model.vision_model(**pixels).pooler_output)
        else:
            pooled = (model.vision_model if family == "siglip" else model)(**pixels).pooler_output
    assert torch.allclose(together, pooled, atol=1e-5)


def test_what_is_no_image_encoder_is_refused(tmp_path):
    config = AutoConfig.for_model("llama", **VISION, num_key_value_heads=2, vocab_size=50)
    AutoModel.from_config(config).save_pretrained(tmp_path / "llama")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "llama")
    with pytest.raises(OptionError, match=r"'llama'[\s\S]*clip, siglip"):
        ClipEmbedder.from_pretrained(tmp_path / "llama")
    with pytest.raises(OptionError, match="nowhere"):
        ClipEmbedder.from_pretrained(tmp_path / "nowhere")
