"""Methods that choose in front of the language model, at work in models: exact counts, and what they cannot read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from mllm.errors import OptionError
from mllm.inference.generation import generation_config
from mllm.inference.prompt import encode_prompt, model_inputs
from mllm.pruning import PRUNERS, HiRED, Pruner
from mllm.testing import tiny_model
from mllm.testing_stock import tiny_stock_batch, tiny_stock_model

PEERS = ("divprune", "hired", "tome", "visionzip")
NEED_PATCHES = ("hired", "visionzip")
VIEWS_IN_TILES = {"llava_next": {"tiles": "llava_next"}, "sphinx": {"tiles": "sphinx"}}


def question(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "Is there a 5?"}]}]


def prompted(model: PreTrainedModel, processor: Any, pruner: Pruner, *sizes: tuple[int, int]) -> Pruner:
    """The pruner after the model has answered a question about pictures of these sizes."""
    inputs = model_inputs(processor, [encode_prompt(processor, question(*sizes))], device=model.device)
    with pruner(model):
        model.generate(**inputs, generation_config=generation_config(model, max_new_tokens=3, temperature=0.0))
    return pruner


def check_counts(pruner: Pruner, num_layers: int) -> None:
    """Of each item as many tokens are left as the method says of its length."""
    for items in pruner.statistics.items:
        assert items
        for item in items:
            assert [len(item.kept[0])] * num_layers == pruner.counts(item.num_tokens, num_layers)
            assert len(item.kept[0]) == pruner.budget(item.num_tokens)


@pytest.mark.parametrize("tokens", [1, 3, 0.5, 9])
@pytest.mark.parametrize("name", PEERS)
def test_llava_sees_as_many_tokens_as_said(name: str, tokens: float):
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 4, "image_size": 24, "patch_size": 8, "projection_dim": 32}
    model = tiny_stock_model("llava", vision_config=vision)
    batch = tiny_stock_batch(tiny_stock_model("llava"))
    ids, image = batch["input_ids"], model.config.image_token_id
    nine = torch.full((len(ids), 9), image)
    ids = torch.cat([ids[:, :3], nine, ids[:, 7:]], dim=1)
    pruner = PRUNERS[name](tokens=tokens)
    with pruner(model), torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.randn(len(ids), 3, 24, 24)).logits
    assert logits.shape[:2] == ids.shape
    assert bool(logits.isfinite().all())
    check_counts(pruner, 2)


@pytest.mark.parametrize("tiles", VIEWS_IN_TILES.values(), ids=VIEWS_IN_TILES.keys())
@pytest.mark.parametrize("name", PEERS)
def test_tiles_of_pictures_are_reduced_to_one_budget(name: str, tiles: dict[str, Any], tmp_path: Path):
    model, processor = tiny_model(tmp_path, image=tiles)
    for tokens in (1, 5, 0.4):
        check_counts(prompted(model, processor, PRUNERS[name](tokens=tokens), (64, 70), (10, 40)), 2)


@pytest.mark.parametrize("name", PEERS)
def test_compacted_positions_are_possible(name: str, tmp_path: Path):
    model, processor = tiny_model(tmp_path)
    check_counts(prompted(model, processor, PRUNERS[name](tokens=3, positions="compacted"), (20, 20)), 2)


def test_without_a_class_token_visionzip_goes_by_what_patches_receive_and_hired_is_refused(tmp_path: Path):
    model, processor = tiny_model(tmp_path, encoder="siglip_vision_model")
    check_counts(prompted(model, processor, PRUNERS["visionzip"](tokens=2), (20, 20)), 2)
    with pytest.raises(OptionError, match="class token"):
        prompted(model, processor, HiRED(tokens=2), (20, 20))


@pytest.mark.parametrize("name", PEERS)
def test_of_a_connector_that_mixes_patches_vectors_can_be_read_only_by_themselves(name: str, tmp_path: Path):
    connector = {"type": "perceiver", "num_latents": 5, "depth": 1, "heads": 4, "head_size": 4}
    model, processor = tiny_model(tmp_path, image={"connector": connector})
    if name in NEED_PATCHES:
        with pytest.raises(OptionError, match="divprune"):
            prompted(model, processor, PRUNERS[name](tokens=2), (20, 20))
    else:
        check_counts(prompted(model, processor, PRUNERS[name](tokens=2), (20, 20)), 2)
