"""The processor itself: what it refuses, and image processors that are not of our making."""

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from mllm.errors import OptionError
from mllm.processing import MllmProcessor
from mllm.processing.build import add_placeholder
from mllm.testing import tiny_tokenizer

USER = {"role": "user", "content": "hi"}


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer("qwen")
    add_placeholder(tokenizer, "<image>", num_rows=len(tokenizer) + 1)
    return tokenizer


def test_an_image_processor_of_another_kind_is_called_itself():
    settings = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    pictures = [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (10, 40), "blue")]
    processor = MllmProcessor(_tokenizer(), settings)
    assert torch.equal(
        processor.encode_images(pictures), settings(pictures, return_tensors="pt")["pixel_values"].float()
    )


def test_no_chat_template():
    with pytest.raises(OptionError, match="a processor without a chat template"):
        MllmProcessor(_tokenizer()).encode_chat([USER])


def test_components_in_the_wrong_place():
    with pytest.raises(TypeError, match="for argument image_processor"):
        MllmProcessor(_tokenizer(), _tokenizer())


def test_without_images_there_is_no_placeholder():
    processor = MllmProcessor(_tokenizer())
    assert (processor.image_token, processor.image_token_id, processor.image_token_rule) == (None, None, None)
    assert not hasattr(processor, "image_processor")
