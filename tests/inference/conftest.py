"""A tiny random model that talks nonsense, and things to ask it."""

import numpy as np
import pytest
from PIL import Image

from mllm.assemble import assemble
from mllm.testing import save_tiny_parts, tiny_model
from mllm.testing_sounds import save_tiny_audio_encoder


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """A model and its processor. Its logits are scaled up so that answers differ between questions."""
    model, processor = tiny_model(tmp_path_factory.mktemp("talker"), encoder="siglip_vision_model")
    for parameter in model.get_output_embeddings().parameters():
        parameter.data *= 20
    return model.eval(), processor


@pytest.fixture(scope="session")
def picture():
    """Make the picture of a number."""

    def make(number: int) -> Image.Image:
        height, width = 11 + number % 5, 17 - number % 7
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture(scope="session")
def conversations(picture):
    """Of unequal length: without an image, with one, with three, and of several turns."""

    def text(words: str) -> dict:
        return {"type": "text", "text": words}

    def image(number: int) -> dict:
        return {"type": "image", "image": picture(number)}

    return [
        [{"role": "user", "content": "Is there a 5?"}],
        [{"role": "user", "content": [image(0), text("What is in the picture?")]}],
        [{"role": "user", "content": [image(1), text("Compare"), image(2), text("with"), image(3)]}],
        [
            {"role": "user", "content": [image(4), text("How many digits are green?")]},
            {"role": "assistant", "content": [text("Two digits are green: 4 and 9.")]},
            {"role": "user", "content": [text("Where?"), image(5)]},
        ],
        [{"role": "user", "content": [image(6)]}],
    ]


@pytest.fixture(scope="session")
def listener(tmp_path_factory):
    """A model that reads images, sounds in windows of a second, and four frames of a video; and its processor.

    What it hears and sees is scaled up, too, so that its answers differ.
    """
    root = tmp_path_factory.mktemp("listener")
    parts = save_tiny_parts(root, encoder="siglip_vision_model")
    model, processor = assemble(
        **parts,
        audio={"encoder": save_tiny_audio_encoder(root / "whisper"), "connector": "mlp"},
        video={"connector": {"type": "mlp"}, "frames": "uniform:4"},
    )
    heard = (model.model.audio_tower.connector, model.model.video_tower.connector)
    for module, factor in ((model.get_output_embeddings(), 20), *((connector, 4) for connector in heard)):
        for parameter in module.parameters():
            parameter.data *= factor
    return model.eval(), processor
