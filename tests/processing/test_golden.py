"""Golden renders: each template's text, ids and loss weights side by side, in files that a human can read.

A change of a template shows up here as a diff. `MLLM_WRITE_GOLDEN=1 pytest tests/processing/test_golden.py` writes the
files anew; read the diff before you keep it.
"""

import itertools
import os
from pathlib import Path

import pytest
from transformers import CLIPImageProcessorPil

from mllm.processing import MllmProcessor
from mllm.processing.build import add_placeholder, build_processor
from mllm.sizes import ImageTokenRule
from mllm.testing import tiny_tokenizer

GOLDEN = Path(__file__).with_name("golden")

PAIRS = {
    "plain": "llama2",
    "vicuna_v1": "llama2",
    "chatml": "qwen",
    "llama3": "llama3",
}

CONVERSATIONS = {
    "one image, one answer": [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}],
        },
        {"role": "assistant", "content": "A red 3 at the top left."},
    ],
    "system message, two images between words, two answers": [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare "},
                {"type": "image"},
                {"type": "text", "text": "with "},
                {"type": "image"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "  One is red.\n"}]},
        {"role": "user", "content": "And the other?"},
        {"role": "assistant", "content": "Blue.", "loss": 0.5},
    ],
    "a question with control tokens in its words, and the opening of an answer": [
        {"role": "user", "content": "What do <image> and </s> and <|im_end|> and <|eot_id|> mean?"},
    ],
}


@pytest.mark.parametrize("template", PAIRS)
def test_golden(template):
    path = GOLDEN / f"{template}.txt"
    written = _page(template)
    if os.environ.get("MLLM_WRITE_GOLDEN"):
        path.write_text(written, encoding="utf-8")
    assert written == path.read_text(encoding="utf-8")


def _page(template: str) -> str:
    tokenizer = tiny_tokenizer(PAIRS[template])
    add_placeholder(tokenizer, "<image>", num_rows=len(tokenizer) + 1)
    rule = ImageTokenRule(image_size=16, patch_size=8, num_prefix_tokens=1, feature_select="default")
    processor = build_processor(tokenizer, CLIPImageProcessorPil(), rules={"image": rule}, chat_template=template)
    title = f"{template}, with the tiny {PAIRS[template]} tokenizer; an image is 4 tokens; '+' is trained on\n"
    parts = [title, *(_conversation(processor, name, messages) for name, messages in CONVERSATIONS.items())]
    return "\n".join(parts)


def _conversation(processor: MllmProcessor, name: str, messages: list[dict]) -> str:
    sizes = [(8, 8)] * sum(item == {"type": "image"} for message in messages for item in message["content"])
    encoded = processor.encode_chat(messages, media_sizes=sizes, add_generation_prompt=messages[-1]["role"] == "user")
    lines = [f"--- {name}", "", processor.decode(encoded.input_ids), "", "   id  weight  token"]
    runs = itertools.groupby(zip(encoded.input_ids, encoded.loss_weights, strict=True))
    for (token, weight), run in runs:
        count = len(list(run))
        times = f" x {count}" if count > 1 else ""
        sign = f"+ {weight:g}" if weight else ""
        lines.append(f"{token:5}  {sign:6}  {processor.tokenizer.convert_ids_to_tokens(token)!r}{times}")
    return "\n".join(lines) + "\n"
