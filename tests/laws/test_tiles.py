"""Images in tiles: as many tokens as their sizes say, and the same result however they are batched.

Alone == together, packed == padded, the encoder in chunks == in one call, generation with a cache == without, ranks
with and without images == one process.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from mllm import load_model
from mllm.assemble import assemble_checkpoint
from mllm.data.collate import PackingCollator, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.inference.generation import generation_config
from mllm.inference.prompt import encode_prompt, model_inputs
from mllm.load import merged
from mllm.models.segment_attention import isolate_segments
from mllm.processing.media import MediaInput
from mllm.sizes import num_tokens
from mllm.testing import save_tiny_parts, save_tiny_rows, tiny_model

LATENTS = {"type": "perceiver", "num_latents": 3, "depth": 1}
CASES = {
    "llava_next": {"tiles": "llava_next"},
    "llava_next, merged": {"tiles": {"type": "llava_next", "max_tiles": 6}, "connector": "patch_merge"},
    "internvl": {"tiles": {"type": "internvl", "max_tiles": 6}, "connector": "patch_merge"},
    "sphinx": {"tiles": "sphinx"},
    "sphinx, latents": {"tiles": "sphinx", "connector": LATENTS},
    "sphinx, joined": {"tiles": "sphinx", "connector": {**LATENTS, "per": "item", "positions": 5}},
}
SIZES = [(20, 20), (10, 40), (33, 9), (1, 1), (1, 50), (200, 1), (64, 70)]


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def composed(request, tmp_path):
    """A model that reads images in tiles, and its processor."""
    return tiny_model(tmp_path, image=request.param)


def test_counted_are_made_alone_and_together(composed):
    model, processor = composed
    items = [MediaInput("image", _noise(*size), size) for size in SIZES]
    with torch.no_grad():
        together = model.get_image_features(**processor.encode_media(items)).pooler_output
        alone = [model.get_image_features(**processor.encode_media([item])).pooler_output[0] for item in items]
    assert [len(one) for one in together] == [num_tokens(size, processor.rule("image")) for size in SIZES]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_packed_equals_padded(composed, tmp_path):
    model, processor = composed
    examples = _examples(processor, tmp_path)
    padded = _loss_and_gradients(model, PaddingCollator(processor)(examples))
    isolate_segments(model, longest=200)
    _assert_equal(_loss_and_gradients(model, PackingCollator(processor)(examples)), padded)


def test_chunks_equal_one_call(composed, tmp_path):
    model, processor = composed
    batch = PaddingCollator(processor)(_examples(processor, tmp_path))
    whole, calls = _loss_and_gradients(model, batch), []
    model.model.image_tower.encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for chunk in (1, 4, 1000):
        calls.clear()
        model.model.set_encoder_chunk(chunk)
        _assert_equal(_loss_and_gradients(model, batch), whole)
        assert sum(calls) == len(batch["pixel_values"]) and max(calls) <= chunk


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_with_a_cache_equals_without(composed, num_beams):
    model, processor = composed
    prompts = [[_noise(10, 40)], [_noise(33, 9), _noise(20, 20)], []]
    encoded = [encode_prompt(processor, [{"role": "user", "content": _content(images)}]) for images in prompts]
    inputs = model_inputs(processor, encoded, device=model.device)
    config = generation_config(model, max_new_tokens=6, temperature=0.0)
    config.num_beams = num_beams
    cached, uncached = (
        model.generate(**inputs, generation_config=config, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("name", ["llava_next", "sphinx"])
def test_frames_beside_tiles_are_not_cut(tmp_path, name, through):
    """One call of the encoder reads tiles and frames; each medium becomes what it becomes alone."""
    video = {"frames": "uniform:3", "connector": "mlp", "through_image_connector": through}
    model, processor = tiny_model(tmp_path, image=CASES[name], video=video)
    size = (10, 40, 6, 2.0)
    picture = MediaInput("image", _noise(33, 9), (33, 9))
    clip = MediaInput("video", [_noise(10, 40)] * 3, size)
    chat = processor.encode_chat(
        [{"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]}],
        media_sizes=[size, (33, 9)],
    )
    both = processor.encode_media([clip, picture])
    assert both["pixel_values_videos"].shape[0] == 3
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([chat.input_ids]), **both).logits
        image = model.get_image_features(**processor.encode_media([picture]))
        frames = model.get_video_features(**processor.encode_media([clip]))
        parted = model(
            input_ids=torch.tensor([chat.input_ids]), mm_encoder_outputs={"image": image, "video": frames}
        ).logits
    torch.testing.assert_close(whole, parted, rtol=1e-5, atol=1e-5)
    assert [len(one) for one in frames.pooler_output] == [num_tokens(size, processor.rule("video"))] == [12]


@pytest.mark.parametrize("name", ["llava_next", "sphinx"])
def test_ranks_with_and_without_images_equal_one_process(train, lopsided_rows, two_ranks, tmp_path, name):
    model = str(assemble_checkpoint(tmp_path / "model", **save_tiny_parts(tmp_path, image=CASES[name])))
    options = {
        "model": model,
        "data": [str(lopsided_rows)],
        "parts": {"image.encoder": "full", "image.connector": "full", "text": {"mode": "lora", "rank": 4}},
        "optim": "sgd",
        "max_steps": 3,
    }
    train(tmp_path / "one", per_device_train_batch_size=4, **options)
    two_ranks(_train_in_a_rank, train, tmp_path / "two", options)
    paths = (tmp_path / "one" / "final", tmp_path / "two" / "final", model)
    one, two, before = (merged(load_model(path)).state_dict() for path in paths)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5, msg=key)
    learned = [key for key in before if ".arrangement." in key]
    assert learned and not any(torch.equal(before[key], one[key]) for key in learned)


def _train_in_a_rank(train, directory, options) -> None:
    train(directory, **options)


def _noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _content(images) -> list[dict]:
    return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What is it?"}]


def _examples(processor, directory) -> list:
    rows = save_tiny_rows(directory / "rows", 5, num_images=lambda number: number % 3)
    examples = Examples(open_mixture(read_mixture([str(rows)])), processor)
    return [examples[number] for number in range(len(examples))]


def _loss_and_gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    connector = model.model.image_tower.connector
    assert {f"model.image_tower.connector.{name}" for name, _ in connector.named_parameters()} <= gradients.keys()
    return {"loss": loss.detach(), **gradients}


def _assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)
