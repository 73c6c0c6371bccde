"""A model with several image encoders trains, answers and is resumed as any other does."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm import load_model, load_processor
from mllm.assemble import assemble_checkpoint
from mllm.inference import generate_answers
from mllm.load import merged
from mllm.models.parts import PartOptions, apply_modes, checkpoint_parts, layers_of, parts_of
from mllm.testing import save_tiny_parts
from mllm.testing_images import save_sphinx_encoders
from mllm.training.preflight.memory import media_positions

FULL = {"image.encoder": "full", "image.connector": "full"}
ORDER = ("first", "second", "third", "fourth")
LAYERS = [3, 2, 3, 2]
"""Of each: those of three that lead to the features, and the stages of the ConvNeXt."""
SETTLED = {"optim": "sgd", "logging_steps": 1, "max_steps": 3}
"""Adam would make a whole step of the sign of a rounding error, where a gradient is next to nothing."""


@pytest.fixture(scope="module")
def sphinx(tmp_path_factory) -> dict:
    """Options of `assemble`: four encoders, three of them joined by channels, and four quarters beside the whole."""
    root = tmp_path_factory.mktemp("sphinx")
    image = {"encoder": save_sphinx_encoders(root), "join": "sequence", "connector": "streams"}
    return save_tiny_parts(root / "parts") | {"image": {**image, "feature_select": "full"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory, sphinx) -> Path:
    return assemble_checkpoint(tmp_path_factory.mktemp("model") / "model", **sphinx)


def _assert_same(one: Path, other: Path) -> None:
    ours, theirs = (merged(load_model(run / "final")).state_dict() for run in (one, other))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_every_encoder_trains_and_chunks_change_nothing(train, model, tmp_path):
    options = SETTLED | {"model": str(model), "parts": FULL}
    train(tmp_path / "whole", **options)
    train(tmp_path / "chunks", **options, encoder_chunk=1)
    _assert_same(tmp_path / "whole", tmp_path / "chunks")
    before, after = (load_model(path).state_dict() for path in (model, tmp_path / "whole" / "final"))
    for part in ("first.qformer", "second", "third", "fourth"):
        changed = [
            name for name in before if f"encoder.{part}." in name and not torch.equal(before[name], after[name])
        ]
        assert changed, part


def test_cached_features_equal_uncached(train, sphinx, tmp_path):
    tiles = {"image": {**sphinx["image"], "tiles": "sphinx"}}
    path = assemble_checkpoint(tmp_path / "model", **(sphinx | tiles))
    options = SETTLED | {"model": str(path), "parts": {"image.connector": "full"}}
    train(tmp_path / "uncached", **options)
    train(tmp_path / "cached", **options, feature_cache=str(tmp_path / "features"))
    _assert_same(tmp_path / "uncached", tmp_path / "cached")


def test_two_ranks_equal_one_process(train, model, lopsided_rows, two_ranks, tmp_path):
    """One of them has no image in some steps; its encoders are called all the same."""
    options = SETTLED | {"model": str(model), "data": [str(lopsided_rows)], "parts": FULL}
    train(tmp_path / "one", per_device_train_batch_size=4, **options)
    two_ranks(_train, train, tmp_path / "two", options)
    _assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_sharded_equals_one_process(train, model, lopsided_rows, two_ranks, tmp_path):
    """Under ZeRO-3 a rank gathers the weights of each module that is called, and waits for the others to do so."""
    options = SETTLED | {"model": str(model), "data": [str(lopsided_rows)], "parts": FULL, "encoder_chunk": 1}
    train(tmp_path / "one", per_device_train_batch_size=4, **options)
    two_ranks(_train_sharded, train, tmp_path / "two", options)
    _assert_same(tmp_path / "one", tmp_path / "two")


def _train(train, out: Path, options: dict) -> None:
    train(out, **options)
    assert os.environ["WORLD_SIZE"] == "2"


def _train_sharded(train, out: Path, options: dict) -> None:
    """As `accelerate launch` starts it with train/accelerate/zero3.yaml, on CPUs."""
    settings = {"ZERO_STAGE": "3", "ZERO3_INIT": "true", "ZERO3_SAVE_16BIT_MODEL": "true"}
    os.environ |= {f"ACCELERATE_DEEPSPEED_{name}": value for name, value in settings.items()}
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    del os.environ["ACCELERATE_USE_CPU"]
    train(out, **options)


def test_answers_do_not_depend_on_the_batch(model):
    chat = load_model(model), load_processor(model)
    for parameter in chat[0].get_output_embeddings().parameters():
        parameter.data *= 20  # or all answers would be the same
    pictures = [Image.effect_noise((20 + number, 30), 60 + 40 * number).convert("RGB") for number in range(3)]
    asked = [_question(*pictures[:1]), _question(*pictures[1:]), _question()]
    alone = [generate_answers(*chat, [one], batch_size=1, max_new_tokens=8)[0] for one in asked]
    assert generate_answers(*chat, asked, batch_size=3, max_new_tokens=8) == alone
    assert len(set(alone)) == 3


def _question(*pictures: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What is in the picture?"}]}]


def test_a_preflight_counts_the_positions_that_each_encoder_has(model):
    """Of an image of 32 pixels CLIP sees 16: 2 x 2 patches. ConvNeXt begins with 8 x 8 cells of them."""
    encoder = load_model(model).model.image_tower.encoder
    pixels = torch.zeros(3, 3, 32, 32)
    assert media_positions(encoder.second, pixels[..., :16, :16]) == 3 * 4
    assert media_positions(encoder, pixels) == media_positions(encoder.third, pixels[..., :16, :16]) == 3 * 64


def test_every_encoder_has_its_layers_checkpointed(model):
    """Beside adapters, too: then the first layer of each has to ask for gradients."""
    modes = {"image.encoder": PartOptions("lora", rank=2, checkpointing=True)}
    gradients = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        trained = apply_modes(load_model(model), modes)
        plain = trained.get_base_model()
        names = layers_of(plain, parts_of(plain)["image.encoder"])
        assert [len([name for name in names if f".{one}." in name]) for one in ORDER] == LAYERS
        if reentrant is not None:
            checkpoint_parts(trained, modes, reentrant=reentrant)
        for name, value in trained.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value)
        trained.train()
        plain.model.image_tower.encode(torch.randn(2, 3, 32, 32)).square().mean().backward()
        gradients.append({name: value.grad for name, value in trained.named_parameters() if value.requires_grad})
    without, *others = gradients
    assert all(value is not None for value in without.values())
    for other in others:
        for name, value in without.items():
            torch.testing.assert_close(other[name], value, msg=name)
