"""Rows whose images are cut into tiles: extreme ones are trained on; one that is not what was counted is left out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.assemble.tiles import TILES
from mllm.data.collate import LeavingOut, PaddingCollator
from mllm.data.examples import Examples
from mllm.data.mixture_file import open_mixture, read_mixture
from mllm.sizes import num_tokens
from mllm.testing import tiny_model

# One pixel high or wide, as thin as images may be, and one that asks for more pixels than any grid has.
SIZES = [(1, 1), (1, 200), (200, 1), (1, 7), (400, 350)]


@pytest.mark.parametrize("name", TILES)
def test_extreme_images_are_trained_on(tmp_path, name):
    model, processor = tiny_model(tmp_path / "parts", image={"tiles": name})
    examples = _examples(tmp_path, processor, SIZES)
    collated = LeavingOut(PaddingCollator(processor))(examples)
    assert collated.left_out == ()
    placeholders = (collated.batch["input_ids"] == processor.image_token_id).sum(1)
    assert placeholders.tolist() == [num_tokens(size, processor.rule("image")) for size in SIZES]
    assert placeholders.min() > 0
    assert collated.batch["image_sizes"].tolist() == [list(size) for size in SIZES]
    loss = model(**collated.batch).loss
    loss.backward()
    gradients = [one.grad for one in model.model.image_tower.connector.parameters()]
    assert loss.isfinite() and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_an_image_that_has_changed_since_it_was_indexed_is_left_out(tmp_path):
    """The index compares stated sizes with headers; what was written behind its back would have other tiles."""
    _, processor = tiny_model(tmp_path / "parts", image={"tiles": "llava_next"})
    examples = _examples(tmp_path, processor, [(20, 20), (40, 10), (12, 13)])
    _save(tmp_path / "1.png", (10, 40))
    collated = LeavingOut(PaddingCollator(processor))(examples)
    [left_out] = collated.left_out
    assert left_out.position == 1
    assert "an image of 10 x 40 (height x width), which the row says is 40 x 10" in str(left_out.error)
    assert collated.batch["image_sizes"].tolist() == [[20, 20], [12, 13]]


def _examples(directory, processor, sizes) -> list:
    """A row for each image."""
    rows = []
    for number, size in enumerate(sizes):
        _save(directory / f"{number}.png", size)
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
        answer = {"role": "assistant", "content": "a red 3"}
        media = [{"kind": "image", "path": f"{number}.png", "height": size[0], "width": size[1]}]
        rows.append({"id": str(number), "source": "tiny", "messages": [question, answer], "media": media})
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    examples = Examples(open_mixture(read_mixture([str(directory / "rows.jsonl")])), processor)
    return [examples[number] for number in range(len(examples))]


def _save(path, size) -> None:
    pixels = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
